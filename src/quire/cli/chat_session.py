"""A conversation: what was said, the settings of its answers, and the commands that change both."""

import difflib
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from quire.cli import chat_file
from quire.cli.chat_file import Message
from quire.errors import InvalidRequestError, OverloadedError, RequestFailedError, unknown_name_message
from quire.sampling_params import SamplingParams

Say = Callable[[str, int], None]
"""Takes a piece of an answer, and how many tokens it has; 0 where that is not known yet."""
Answer = Callable[[list[Message], Mapping[str, Any], Say, bool], None]
"""Answers a conversation under sampling parameters, saying each piece as it comes; the last: tokens must be counted."""
SETTINGS = (
    "temperature top_p top_k min_p typical_p seed presence_penalty frequency_penalty repetition_penalty stop "
    "max_tokens min_tokens ignore_eos"
).split()
"""Sampling parameters that `/set` takes."""
UNKNOWN = "the server's own"
COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?\s*", re.DOTALL)
ALIASES = {"reset": "clear", "quit": "exit", "bye": "exit"}
KEYS = """A line that ends in \\ goes on in the next; so does what is between lines of \"\"\".
Pasted lines are one message. The arrow keys bring back what was typed. A space before the / makes it a message.
Ctrl-C stops the answer, Ctrl-D leaves."""


class Terminal(Protocol):
    """Where a person types and reads."""

    renders: bool
    """Whether Markdown can be shown as what it means."""

    def read(self) -> str | None:
        """The next message or command; None at the end."""

    def tell(self, text: str) -> None:
        """A line of the program's own."""

    def answer(self, *, markdown: bool) -> AbstractContextManager[Callable[[str], None]]:
        """Shows the pieces of one answer as they come."""


@dataclass(slots=True)
class Timing:
    """Of one answer."""

    start_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    num_first: int = 0
    """Tokens that came at `first_s`."""

    def took(self, text: str, num_tokens: int, now_s: float) -> None:
        """A piece has come."""
        self.num_tokens += num_tokens
        if text and not self.first_s:
            self.first_s, self.num_first = now_s, num_tokens or 1
        if text:
            self.last_s = now_s

    def shown(self) -> str:
        """In words."""
        if not self.num_tokens or not self.first_s:
            return "[no tokens were counted]"
        after, seconds = self.num_tokens - self.num_first, self.last_s - self.first_s
        rate = f", {after / seconds:.1f} tokens/s" if after > 0 and seconds > 0 else ""
        return f"[{self.num_tokens} tokens{rate}; the first after {self.first_s - self.start_s:.2f} s]"


class Conversation:
    """One conversation.

    Args:
        values: sampling parameters that apply where `/set` has not said otherwise.
        defaults: what applies where neither says; a server's are not known here.
        stats: say after each answer how fast it was.
    """

    def __init__(
        self,
        answer: Answer,
        terminal: Terminal,
        system: str | None,
        values: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        stats: bool = False,
    ) -> None:
        self._answer, self._terminal = answer, terminal
        self._system, self._messages = system, list[Message]()
        self._failed: tuple[list[Message], str] | None = None
        """A question that was refused, and what was said before it: for `/retry`."""
        self._values, self._given, self._defaults = dict(values), dict[str, Any](), dict(defaults or {})
        self._shows = {"stats": stats, "markdown": terminal.renders}

    def run(self) -> None:
        """Read and answer until the end."""
        while (line := self._terminal.read()) is not None:
            try:
                if not self._took(line):
                    return
            except KeyboardInterrupt:
                self._terminal.tell("[stopped]")

    def _took(self, line: str) -> bool:
        """Do what a line asks for; False to leave."""
        found = COMMAND.fullmatch(line)
        name, argument = (ALIASES.get(found[1], found[1]), (found[2] or "").strip()) if found else ("", "")
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        if name == "exit":
            return False
        if name in COMMANDS:
            try:
                COMMANDS[name].do(self, argument)
            except InvalidRequestError as error:
                self._terminal.tell(f"quire: {error}")
        elif near or (name and not argument):
            hint = f"; did you mean /{near[0]}?" if near else ""
            self._terminal.tell(f"/{name[:40]} is not known; /help lists what is{hint}")
        elif line.strip():
            self._ask(self._messages, line.strip())
        return True

    def _ask(self, before: list[Message], said: str) -> None:
        """One question and its answer. Of a refusal nothing stays; of a stopped answer what came."""
        asked: Message = {"role": "user", "content": said}
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        heard, timing, end = list[str](), Timing(time.perf_counter()), ""
        with self._terminal.answer(markdown=self._shows["markdown"]) as show:

            def say(text: str, num_tokens: int) -> None:
                heard.append(text)
                timing.took(text, num_tokens, time.perf_counter())
                show(text)

            try:
                self._answer([*system, *before, asked], {**self._values, **self._given}, say, self._shows["stats"])
            except KeyboardInterrupt:
                end = "[stopped]"
            except (InvalidRequestError, OverloadedError, RequestFailedError) as error:
                end, self._failed = f"quire: {error} (/retry asks again, /clear begins anew)", (before, said)
        if end:
            self._terminal.tell(end)
        if end.startswith("quire:"):
            return
        self._failed = None
        self._messages = [*before, asked, {"role": "assistant", "content": "".join(heard)}]
        if self._shows["stats"]:
            self._terminal.tell(timing.shown())

    def _help(self, _: str) -> None:
        lines = [f"{f'/{name} {one.argument}':22} {one.text}" for name, one in COMMANDS.items()]
        self._terminal.tell("\n".join([*lines, f"{'/exit':22} leave", KEYS]))

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text == "none" else text
        self._terminal.tell(f"system prompt: {self._system or 'none'}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name in self._shows:
            self._switch(name, value)
        elif name and name not in SETTINGS:
            raise InvalidRequestError(unknown_name_message("setting", name[:40], [*SETTINGS, *self._shows]), param=name)
        elif name and not value:
            self._terminal.tell(f"{name} = {self._of(name)}; /set {name} VALUE, or none for what it was")
        elif name:
            self._given = self._checked({**self._given, name: None if value == "none" else _value(name, value)})
        else:
            shown = {name: self._of(name) for name in SETTINGS}
            shown |= {name: "on" if one else "off" for name, one in self._shows.items()}
            lines = [f"{name} = {one}" for name, one in shown.items() if one != UNKNOWN]
            unknown = " ".join(name for name, one in shown.items() if one == UNKNOWN)
            self._terminal.tell("\n".join([*lines, f"{UNKNOWN}: {unknown}"] if unknown else lines))

    def _switch(self, name: str, value: str) -> None:
        if value not in ("on", "off"):
            raise InvalidRequestError(f"{name} must be on or off, got {value[:40]!r}", param=name)
        if name == "markdown" and value == "on" and not self._terminal.renders:
            raise InvalidRequestError("markdown needs a terminal and pip install 'quire[chat]'", param=name)
        self._shows[name] = value == "on"

    def _of(self, name: str) -> str:
        values = {**self._defaults, **self._values, **self._given}
        return UNKNOWN if name not in values else "none" if values[name] in (None, []) else f"{values[name]}"

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What applies of it, if it is in range; InvalidRequestError names the field and the limit."""
        kept = {name: value for name, value in given.items() if value is not None}
        SamplingParams.from_mapping({"max_tokens": None, **self._values, **kept})
        return kept

    def _retry(self, _: str) -> None:
        if self._failed is not None:
            self._ask(*self._failed)
        elif self._messages:
            self._ask(self._messages[:-2], self._messages[-2]["content"])
        else:
            raise InvalidRequestError("/retry: nothing was asked yet")

    def _save(self, name: str) -> None:
        path = chat_file.save(name, chat_file.Saved(self._system, self._given, self._messages))
        self._terminal.tell(f"saved in {path}: {len(self._messages)} messages")

    def _load(self, name: str) -> None:
        found = chat_file.load(name)
        for field in found.settings:
            if field not in SETTINGS:
                raise InvalidRequestError(unknown_name_message("setting", field[:40], SETTINGS), param=field)
        given = self._checked(found.settings)
        self._system, self._given, self._messages, self._failed = found.system, given, found.messages, None
        self._terminal.tell(f"loaded: {len(found.messages)} messages")

    def _clear(self, _: str) -> None:
        self._messages, self._failed = [], None

    def _show(self, _: str) -> None:
        said = [f"{one['role']}: {one['content']}" for one in self._messages]
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in self._given.items())
        lines = [f"system prompt: {self._system or 'none'}", f"settings: {given or 'as at the start'}", *said]
        self._terminal.tell("\n".join(lines))


def _value(name: str, text: str) -> Any:
    """As JSON has it; a text to stop at may stand without quotes."""
    if name == "stop" and text[0] not in '["':
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise InvalidRequestError(f"{name} must be a value as in JSON, got {text[:40]!r}", param=name) from None


class Command(NamedTuple):
    """What a word with a slash does."""

    do: Callable[[Conversation, str], None]
    argument: str
    text: str


COMMANDS = {
    "help": Command(Conversation._help, "", "this"),
    "system": Command(Conversation._set_system, "[TEXT|none]", "the system prompt: show it, change it, leave it out"),
    "set": Command(Conversation._set, "[NAME [VALUE]]", "settings: show them, change one (temperature, stats on ...)"),
    "show": Command(Conversation._show, "", "the system prompt, the settings and what was said"),
    "retry": Command(Conversation._retry, "", "ask the last question again"),
    "save": Command(Conversation._save, "FILE", "keep the conversation and its settings"),
    "load": Command(Conversation._load, "FILE", "go on with one that was kept"),
    "clear": Command(Conversation._clear, "", "forget what was said"),
}
