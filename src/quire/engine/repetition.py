"""Detecting that a sequence repeats itself."""

from collections.abc import Sequence

from quire.sampling_params import RepetitionDetectionParams


class RepetitionDetector:
    """Looks whether the last tokens of a sequence are one pattern, `min_count` times in a row.

    For each size of a pattern it counts for how many tokens each has equalled the one that many places before: so a
    token costs one comparison a size, whatever the count.
    """

    def __init__(self, params: RepetitionDetectionParams) -> None:
        self._sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
        self._min_count = params.min_count
        self._equal = [0] * len(self._sizes)
        self._tokens: list[int] = []

    def push(self, token_ids: Sequence[int]) -> bool:
        """Take tokens; whether the last of them completed a pattern."""
        found = False
        for token_id in token_ids:
            found = self._push(token_id)
        return found

    def _push(self, token_id: int) -> bool:
        tokens, found = self._tokens, False
        for index, size in enumerate(self._sizes):
            if size > len(tokens):
                break
            if tokens[-size] != token_id:
                self._equal[index] = 0
            else:
                self._equal[index] += 1
                found = found or self._equal[index] >= size * (self._min_count - 1)
        tokens.append(token_id)
        return found
