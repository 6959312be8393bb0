"""Every door of a server, in one table: what starts, describes or attacks a server takes it from here.

The first has errors that belong to none. Where two have a route for one path and method the last has it, and passes on
what is not its own.
"""

from quire.server.doors.anthropic.routes import ANTHROPIC
from quire.server.doors.ollama.routes import OLLAMA
from quire.server.doors.openai.routes import OPENAI
from quire.server.doors.tgi.routes import TGI
from quire.server.http.context import Api

DOORS: tuple[Api, ...] = (OPENAI, ANTHROPIC, OLLAMA, TGI)
