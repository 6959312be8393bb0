"""A terminal with `quire[chat]`: prompt_toolkit reads, rich renders."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History as TypedLines
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from quire.cli.chat_session import COMMANDS, SETTINGS
from quire.cli.chat_terminal import CONTROL, Pipe
from quire.cli.history import History

REFRESH_HZ = 8
FENCE = re.compile(r"\s*(`{3,}|~{3,})")
ITEM = re.compile(r"([-*+]|\d{1,9}[.)])\s")


def whole_part(text: str) -> int:
    """Characters of Markdown that no later text changes: they end before a line that begins a block of its own, outside
    code and lists."""
    end, place, fence, after_gap, in_list = 0, 0, "", False, False
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        starts = not line[0].isspace() and line.endswith("\n")
        if not fence and after_gap and starts and not (in_list and ITEM.match(line)):
            end = place
        if not fence and starts:
            in_list = ITEM.match(line) is not None or (in_list and not after_gap)
        after_gap = not line.strip()
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence, after_gap = "", not in_list
        place += len(line)
    return end


class _Tail:
    """Markdown that may still change: its last lines that fit the window."""

    def __init__(self) -> None:
        self.text = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich's protocol."""
        lines = console.render_lines(Markdown(self.text, hyperlinks=False), options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


class _Typed(TypedLines):
    def __init__(self, kept: History) -> None:
        super().__init__()
        self._kept = kept

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._kept.lines())

    def store_string(self, string: str) -> None:
        self._kept.save(string)


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/set "):
            names, begun = [*SETTINGS, "stats", "markdown"], typed.removeprefix("/set ")
        else:
            names, begun = [f"/{name}" for name in (*COMMANDS, "exit")] if typed.startswith("/") else [], typed
        return [Completion(name, -len(begun)) for name in names if name.startswith(begun)]


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class RichTerminal(Pipe):
    """An editor of several lines with the history of earlier chats, and answers rendered as they come."""

    renders = True

    def __init__(self, history: History) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_Typed(history),
            completer=_Commands(),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=". ",
        )
        self._console = Console()
        self.tell("/help says what can be typed; Alt-Enter begins a new line.")

    def _line(self, prompt: str) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.tell("/exit or Ctrl-D leaves")

    @contextmanager
    def answer(self, *, markdown: bool) -> Iterator[Callable[[str], None]]:
        """See `Terminal.answer`: blocks that are whole are printed, the one that grows is drawn again as it does."""
        if not markdown:
            with super().answer(markdown=False) as show:
                yield show
            return
        tail = _Tail()
        with Live(tail, console=self._console, refresh_per_second=REFRESH_HZ, transient=True) as live:

            def show(text: str) -> None:
                grown = tail.text + text.translate(CONTROL)
                end = whole_part(grown)
                tail.text = grown[end:]
                if end:
                    live.console.print(Markdown(grown[:end], hyperlinks=False), "")

            yield show
            rest, tail.text = tail.text, ""
        self._console.print(Markdown(rest, hyperlinks=False))
        sys.stdout.flush()
