"""What the tests say that they ask of clients, read from their source: `pytest.mark.client` and `client_refused`."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests/server"
_CALL = re.compile(r"(?P<call>[a-z_.]+)(?:\((?P<arguments>\w+(?:, \w+)*)\))?")


@dataclass(frozen=True, slots=True)
class Asked:
    """A call of a client with some of its arguments."""

    client: str
    call: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.call}({', '.join(self.arguments)})" if self.arguments else self.call


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark of a test; `refused`: that the call is."""

    asked: Asked
    refused: bool
    file: str
    test: str


def asked_of(arguments: Sequence[str]) -> Iterator[Asked]:
    """What a mark's arguments say: a client, then its calls as `files.create` or `chat(stream, tools)`.

    Raises:
        ValueError: one is no call.
    """
    client, *calls = arguments
    for text in calls:
        found = _CALL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no call")
        named = found["arguments"]
        yield Asked(client, found["call"], tuple(named.split(", ")) if named else ())


def marks() -> list[Mark]:
    """Of all tests of the server, in their order.

    Raises:
        ValueError: a mark that is not written out as strings above a test.
    """
    found: list[Mark] = []
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.client" in text:
            found += _of_file(path.name, ast.parse(text))
    return found


def _of_file(name: str, tree: ast.Module) -> Iterator[Mark]:
    left = sum(map(_is_mark, ast.walk(tree)))
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and _is_mark(decorator.func):
                left -= 1
                refused = getattr(decorator.func, "attr", "") == "client_refused"
                for asked in asked_of([ast.literal_eval(argument) for argument in decorator.args]):
                    yield Mark(asked, refused, name, getattr(node, "name", ""))
    if left:
        raise ValueError(f"{name}: a mark of a client stands elsewhere than above a test")


def _is_mark(node: ast.AST) -> bool:
    """`pytest.mark.client`, and not another thing's `client`."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("client", "client_refused"):
        return False
    return isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
