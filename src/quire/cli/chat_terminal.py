"""A terminal without anything installed, and a pipe: `input`, with readline where Python has it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from quire.cli.chat_session import Terminal
from quire.cli.history import History

CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
"""Characters by which a model's text would command the terminal; tab and new line stay."""
BLOCK = '"""'


def choose(*, saves: bool, plain: bool) -> Terminal:
    """What suits standard input and output.

    Args:
        saves: keep what is typed.
        plain: without what `quire[chat]` brings.
    """
    if not sys.stdin.isatty():
        return Pipe()
    missing = [name for name in ("prompt_toolkit", "rich") if find_spec(name) is None]
    if not plain and not missing and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from quire.cli.chat_rich import RichTerminal

        return RichTerminal(History(saves=saves))
    hint = " pip install 'quire[chat]' adds Markdown and an editor of several lines." if missing else ""
    print(f"/help says what can be typed.{hint}", file=sys.stderr)
    return PlainTerminal(History(saves=saves))


class Pipe:
    """Lines in, text out."""

    renders = False

    def read(self) -> str | None:
        """The next line; None at the end."""
        return self._line("")

    def tell(self, text: str) -> None:
        """On standard error."""
        print(text.translate(CONTROL), file=sys.stderr)

    @contextmanager
    def answer(self, *, markdown: bool) -> Iterator[Callable[[str], None]]:
        """As it comes; controls are left out where a person looks."""
        control = CONTROL if sys.stdout.isatty() else {}
        yield lambda text: print(text.translate(control), end="", flush=True)
        print(flush=True)

    def _line(self, prompt: str) -> str | None:
        while True:
            try:
                return input(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.tell("\n/exit or Ctrl-D leaves")


class PlainTerminal(Pipe):
    """A person, with lines that go on and the arrow keys."""

    def __init__(self, history: History) -> None:
        self._history = history
        with suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one line to `input`
            for line in history.lines():
                readline.add_history(line)

    def read(self) -> str | None:
        """A message or a command; None at the end."""
        line = self._line("> ")
        if line is None:
            return None
        while line.endswith("\\") and (more := self._line(". ")) is not None:
            line = f"{line[:-1]}\n{more}"
        if line.startswith(BLOCK):
            while line.count(BLOCK) < 2 and (more := self._line(". ")) is not None:
                line = f"{line}\n{more}"
            line = line.replace(BLOCK, "").strip("\n")
        self._history.save(line)
        return line
