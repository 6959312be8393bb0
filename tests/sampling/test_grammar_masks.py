"""Masks of grammars on logits, against `numpy.where`, on every provider."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from quire.core.request import GrammarSpec, SamplingSpec
from quire.ops.types import Ops
from quire.sampling.features.grammar import GrammarMasks
from tests.sampling.known_rows import new_row, normal_logits


class Fixed:
    """Grammars and matchers with masks that are given, by row; a matcher is its row's number."""

    def __init__(self, allowed: Any, forced: dict[int, int]) -> None:
        self.allowed, self.forced_tokens = allowed, forced

    def matcher(self, request_id: str, grammar: GrammarSpec) -> Any:
        return _Matcher(int(request_id[1:]), self)

    def fill_masks(self, matchers: Sequence[Any], masks: Any) -> None:
        masks[:] = 0xDEADBEEF  # of a step before, with more rows
        for place, matcher in enumerate(matchers):
            bits = np.packbits(self.allowed[matcher.row], bitorder="little")
            words = np.zeros(masks.shape[1] * 4, np.uint8)
            words[: len(bits)] = bits
            masks[place] = words.view(np.uint32)


class _Matcher:
    def __init__(self, row: int, grammars: Fixed) -> None:
        self.row = row
        self.forced = [grammars.forced_tokens[row]] if row in grammars.forced_tokens else []

    def check(self) -> None:
        pass


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 500, 1027])
def test_what_is_allowed_keeps_its_bits_and_all_else_is_minus_infinity(ops: Ops, vocabulary: int) -> None:
    rows = 6
    allowed = np.random.default_rng(vocabulary).random((rows, vocabulary)) < np.linspace(0, 1, rows)[:, None]
    allowed[:, -1] = True
    forced = {2: vocabulary // 2}
    feature = GrammarMasks(ops, Fixed(allowed, forced))
    for row in range(rows):
        feature.add(new_row(row, [1], SamplingSpec(grammar=GrammarSpec("x", 5))))
    logits = normal_logits(3, rows + 2, vocabulary)
    for chosen in ([0, 1, 2, 3, 4, 5], [5, 2], [3]):  # fewer rows than before, in another order
        found = ops.array(logits.copy(), "float32")
        places = [place + 1 for place in range(len(chosen))]
        feature.apply(found, chosen, places, [1] * len(chosen))
        expected = logits.copy()
        for row, place in zip(chosen, places, strict=True):
            kept = np.arange(vocabulary) == forced[row] if row in forced else allowed[row]
            expected[place] = np.where(kept, logits[place], -np.inf)
        assert ops.to_numpy(found).tobytes() == expected.tobytes()
