"""Docstrings: the tree keeps the check, and the check sees what it is for."""

import pytest

from scripts.house.docstrings import check_docstrings, docstring_breaches, protocol_methods
from scripts.house.tree import ROOT, Source


def test_the_tree_keeps_the_check() -> None:
    assert check_docstrings(ROOT).breaches == []


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("def f(x: Array) -> None:\n    '''Adds one to every number.'''", "arrays without shapes"),
        ("def f(x: NDArray[Any]) -> None: ...", "arrays without shapes"),
        ("class A:\n    def f(self) -> Array:\n        '''The numbers of all rows.'''", "A.f: arrays without shapes"),
        ("def f():\n    '''Do what has to be done.'''\n    raise errors.Bad('x')", "raises Bad"),
        ("class A:\n    '''An odd thing.'''", "a docstring of 3 words"),
        ("def f(x: Array) -> None:\n    '''Adds one to `x [tokens, hidden]`.'''", None),
        ("def f(\n    x: Array,  # [tokens] int32\n) -> None:\n    '''Adds one to every number.'''", None),
        ("def f():\n    '''ValueError where nothing was given.'''\n    raise ValueError('x')", None),
        ("def f():\n    '''Do what has to be done.'''\n    raise", None),
        ("def _f(x: Array) -> None: ...", None),
    ],
)
def test_what_is_missing_is_seen(text: str, breach: str | None) -> None:
    found = docstring_breaches(Source("src/quire/ops/a.py", text))
    assert [item for item in found if breach and breach in item] == found
    assert bool(found) == bool(breach)


def test_an_implementation_need_not_repeat_the_shapes_of_its_protocol() -> None:
    protocol = Source("a.py", "class Ops(Protocol):\n    def f(self, x: Array) -> None: ...")
    provider = Source("b.py", "class Fast:\n    def f(self, x: Array) -> None: ...")
    contracts = protocol_methods(protocol)
    assert contracts == {"f"}
    assert docstring_breaches(provider, contracts) == []
    assert docstring_breaches(provider) != []
    assert docstring_breaches(protocol, contracts) != []
