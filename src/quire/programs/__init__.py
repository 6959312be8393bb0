"""Programs of several calls: `from quire.programs import program, assistant, gen, select, user`."""

from quire.programs.backend import Usage
from quire.programs.parts import assistant, gen, select, system, user
from quire.programs.program import Program, program
from quire.programs.remote import Remote
from quire.programs.state import Call, Forks, State

__all__ = [
    "Call",
    "Forks",
    "Program",
    "Remote",
    "State",
    "Usage",
    "assistant",
    "gen",
    "program",
    "select",
    "system",
    "user",
]
