"""The public names: what `quire` exports is what is written down."""

from scripts.house.names import check_names, compare
from scripts.house.tree import ROOT


def test_the_public_names_are_as_listed() -> None:
    assert check_names(ROOT).breaches == []


def test_each_kind_of_difference_is_seen() -> None:
    assert compare(["A", "B"], ["A", "B"], []) == []
    assert compare(["A", "B"], ["A"], []) == ["B: in tests/law/public_names.txt, not in quire.__all__"]
    assert compare(["A"], ["A", "B"], []) == ["B: in quire.__all__, not in tests/law/public_names.txt"]
    assert compare(["A"], ["A", "A"], []) == ["A: twice in quire.__all__"]
    assert compare(["A"], ["A"], ["A"]) == ["A: quire.A does not exist"]
