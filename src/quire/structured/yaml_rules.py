"""The rules of a grammar while it grows, and their text in Lark's notation."""

import json
from collections.abc import Iterator, Sequence

from quire.structured.samples import LINES
from quire.structured.yaml_scalars import TERMINALS

Symbol = str | tuple[str, int, int | None]
"""The name of a rule or terminal, a literal text of Lark's, or a rule with how often it comes at least and at most."""
Alternative = tuple[Symbol, ...]


class Rules:
    """Rules by name, each with its alternatives."""

    def __init__(self) -> None:
        self._rules: dict[str, list[Alternative]] = {}
        self._terminals: dict[str, str] = dict(TERMINALS)
        self._names: dict[str, str] = {}
        """Of rules and terminals that are made once, by what they are."""
        self._starts: dict[tuple[int, str], None] = {}

    def __len__(self) -> int:
        return len(self._rules)

    def new(self) -> str:
        """A rule without alternatives: nothing matches it."""
        name = f"r{len(self._rules)}"
        self._rules[name] = []
        return name

    def add(self, name: str, *alternatives: Alternative) -> None:
        """More alternatives of a rule."""
        known = self._rules.setdefault(name, [])
        known += [one for one in alternatives if one not in known]

    def once(self, key: str, *alternatives: Alternative) -> str:
        """The rule that is known under this name."""
        if key not in self._names:
            self._names[key] = self.new()
            self.add(self._names[key], *alternatives)
        return self._names[key]

    def terminal(self, definition: str) -> str:
        """The terminal of an expression."""
        if definition not in self._names:
            self._names[definition] = f"T{len(self._terminals)}"
            self._terminals[self._names[definition]] = definition
        return self._names[definition]

    def line(self, depth: int) -> str:
        """The break before a line of this depth."""
        return self.terminal(json.dumps("\n" + "  " * depth))

    def next_line(self, depth: int) -> str:
        """The same after lines without a character."""
        return self.terminal(f"/\\n+ {{{2 * depth}}}/")

    def starts_line(self, text: str, depth: int, *, first: bool = False) -> None:
        """Say that `text` may begin a line of this depth; `first` where it often must."""
        line = (2 * depth, text)
        self._starts = {line: None, **self._starts} if first else {**self._starts, line: None}

    def text(self) -> str | None:
        """The grammar; None if no text matches it."""
        productive = self._productive()
        if "start" not in productive:
            return None
        kept = {name: [*self._held(name, productive)] for name in self._reached(productive)}
        lines = [f"{name}: {' | '.join(map(_rendered, kept[name]))}" for name in kept]
        used = {symbol for alternatives in kept.values() for one in alternatives for symbol in one}
        lines += [f"{name}: {definition}" for name, definition in self._terminals.items() if name in used]
        return LINES + json.dumps([*self._starts]) + "\n" + "\n".join(lines) + "\n"

    def _productive(self) -> set[str]:
        """Rules that some text matches."""
        users: dict[str, list[str]] = {}
        for name, alternatives in self._rules.items():
            for one in alternatives:
                for symbol in one:
                    users.setdefault(symbol if isinstance(symbol, str) else symbol[0], []).append(name)
        found: set[str] = set()
        waiting = list(self._rules)
        while waiting:
            name = waiting.pop()
            if name not in found and any(self._matches(one, found) for one in self._rules[name]):
                found.add(name)
                waiting += users.get(name, ())
        return found

    def _matches(self, alternative: Alternative, productive: set[str]) -> bool:
        return all(
            symbol not in self._rules or symbol in productive
            if isinstance(symbol, str)
            else symbol[1] == 0 or symbol[0] in productive
            for symbol in alternative
        )

    def _held(self, name: str, productive: set[str]) -> Iterator[Alternative]:
        """The alternatives that some text matches, without what comes never."""
        for one in self._rules[name]:
            if self._matches(one, productive):
                yield tuple(
                    symbol for symbol in one if isinstance(symbol, str) or (symbol[0] in productive and symbol[2] != 0)
                )

    def _reached(self, productive: set[str]) -> dict[str, None]:
        reached, waiting = {"start": None}, ["start"]
        while waiting:
            for one in self._held(waiting.pop(), productive):
                for symbol in one:
                    name = symbol if isinstance(symbol, str) else symbol[0]
                    if name in self._rules and name not in reached:
                        reached[name] = None
                        waiting.append(name)
        return reached


def _rendered(alternative: Sequence[Symbol]) -> str:
    return " ".join(map(_symbol, alternative)) or '""'


def _symbol(symbol: Symbol) -> str:
    if isinstance(symbol, str):
        return symbol
    name, least, most = symbol
    if most is None:
        return f"{name}*" if least == 0 else f"{name}{{{least},}}"
    return f"{name}{{{least},{most}}}"
