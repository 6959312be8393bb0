"""The tree of options: probabilities of a model that is a table, where every answer can be added up by hand."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.programs.scoring import Path, common_length, score, tree_of

WIDTH = 3
START = (9, 9)


def chance(path: Path) -> float:
    """Of the last token after those before: any function that sums to 1 over the tokens 0, 1, 2."""
    weights = [1.0 + (7 * token + 3 * len(path) + sum(path[:-1])) % 5 for token in range(WIDTH)]
    return weights[path[-1]] / sum(weights)


def of_text(path: Path) -> float:
    return math.prod(chance(path[:end]) for end in range(len(START) + 1, len(path) + 1))


def scored(paths: list[Path]) -> list[float]:
    tree = tree_of(paths, len(START))
    likelihoods = {(node, token): math.log(chance((*node, token))) for node in tree for token in tree[node]}
    return [score(path, len(START), tree, likelihoods) for path in paths]


tails = st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=4).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(tails, min_size=1, max_size=6, unique=True))
def test_an_option_is_worth_every_text_that_begins_with_it_and_with_no_longer_option(found: list[Path]) -> None:
    """Judged by adding up all texts of five tokens, each once, under the longest option that it begins with."""
    paths = [(*START, *tail) for tail in found]
    mass = dict.fromkeys(paths, 0.0)
    for tail in product(range(WIDTH), repeat=5):
        text = (*START, *tail)
        # It leaves the tree at the first token that no option has there.
        inside = [end for end in range(len(START) + 1, 8) if any(path[:end] == text[:end] for path in paths)]
        place = text[: max(inside, default=len(START))]
        if place in mass:
            mass[place] += of_text(text)
    for path, mean in zip(paths, scored(paths), strict=True):
        is_beginning = any(other != path and other[: len(path)] == path for other in paths)
        count = len(path) - len(START) + is_beginning
        assert math.isclose(math.exp(mean * count), mass[path], rel_tol=1e-9, abs_tol=1e-12)


def test_lengths_do_not_count() -> None:
    """A path twice as long, each token as likely, has the same score: a sum would favour the short one."""
    tree = tree_of([(9, 1), (9, 2, 2)], 1)
    likelihoods = {((9,), 1): -2.0, ((9,), 2): -2.0, ((9, 2), 2): -2.0}
    assert [score(path, 1, tree, likelihoods) for path in [(9, 1), (9, 2, 2)]] == [-2.0, -2.0]


@pytest.mark.parametrize(
    ("paths", "length"),
    [([(1, 2, 3), (1, 2, 4)], 2), ([(1, 2), (1, 2, 4)], 2), ([(1,), (2,)], 0), ([(1, 2, 3)], 3)],
)
def test_what_all_begin_with(paths: list[Path], length: int) -> None:
    assert common_length(paths) == length


@pytest.mark.parametrize(
    ("paths", "start", "text"),
    [
        ([(1, 2), (1, 2)], 1, "two options have the same tokens"),
        ([(1,), (1, 2)], 1, "two options have the same tokens"),
        ([(1,), (2,)], 0, "some text must stand before the options"),
    ],
)
def test_what_cannot_be_scored_is_refused(paths: list[Path], start: int, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        tree_of(paths, start)
