"""What a program writes, and what is refused before anything is asked: each names the variable."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from quire.errors import InvalidRequestError
from quire.programs import assistant, gen, select, user
from quire.programs.parts import MAX_OPTIONS, Gen, Pieces


class City(BaseModel):
    name: str


def given(pieces: Pieces) -> dict[str, Any]:
    (item,) = pieces.items
    assert isinstance(item, Gen)
    return dict(item.given)


def test_texts_and_places_are_joined_in_their_order() -> None:
    pieces = "A: " + gen("a") + ", B: " + gen("b") + "."
    assert [item if isinstance(item, str) else item.name for item in pieces.items] == ["A: ", "a", ", B: ", "b", "."]
    assert assistant("A: ", gen("a"), ", B: " + gen("b"), ".").pieces == pieces


def test_what_is_left_out_is_left_to_the_model() -> None:
    assert given(gen("x")) == {"max_tokens": 256}
    assert given(gen("x", max_tokens=None, stop=".", top_k=3)) == {"max_tokens": None, "stop": ["."], "top_k": 3}


@pytest.mark.parametrize(
    ("kind", "value", "held"),
    [
        ("regex", "[0-9]+", ("regex", "[0-9]+")),
        ("choices", ["a", "b"], ("choice", ["a", "b"])),
        ("choices", Literal["a", "b"], ("choice", ["a", "b"])),
        ("grammar", 'start: "a"', ("grammar", 'start: "a"')),
        ("json", True, ("json", "true")),
    ],
)
def test_each_shape_has_its_keyword(kind: str, value: Any, held: tuple[str, Any]) -> None:
    shape = given(gen("x", **{kind: value}))["structured_outputs"]
    assert (shape.kind, getattr(shape, held[0])) == held


def test_a_model_of_pydantic_is_its_schema() -> None:
    assert '"name"' in given(gen("x", json=City))["structured_outputs"].json


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: gen(""), "gen needs the name of a variable"),
        (lambda: gen("x", regex="a", choices=["a"]), "gen('x'): structured_outputs must hold exactly one of"),
        (lambda: gen("x", regex="a", structured_outputs={"regex": "b"}), "structured_outputs excludes regex"),
        (lambda: gen("x", temperature=-1), "gen('x'): temperature must be in [0, 100], got -1"),
        (lambda: gen("x", max_tokens=0), "gen('x'): max_tokens must be between 1 and"),
        (lambda: gen("x", max_token=1), "did you mean 'max_tokens'?"),
        (lambda: gen("x", choice=["a"]), "did you mean 'choices'?"),
        (lambda: gen("x", n=2), "gen('x'): n does not go with programs"),
        (lambda: select("x", []), f"options must be 1 to {MAX_OPTIONS} texts, got 0"),
        (lambda: select("x", ["a"] * 2), "options hold 'a' twice"),
        (lambda: select("x", ["a", ""]), "options hold '' as an option"),
        (lambda: select("x", "ab"), "options must be a list of texts"),
        (lambda: select("x", [str(number) for number in range(MAX_OPTIONS + 1)]), f"got {MAX_OPTIONS + 1}"),
        (lambda: user("a", 1), "a program writes text, gen and select, not int"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(make: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert text in str(caught.value)
