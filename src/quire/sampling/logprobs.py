"""Log-probabilities of raw logits, as the plain values that go up."""

from collections.abc import Sequence
from typing import Any

from quire.core.plan import TokenLogprobs


def token_logprobs(arrays: Sequence[Any], place: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Of one row: the chosen token, then its `num_top` best. `arrays` are those of `Logprobs`, as numpy has them."""
    chosen, rank, top_ids, top_logprobs = (array[place].tolist() for array in arrays)
    return TokenLogprobs(
        (token_id, *top_ids[:num_top]), (chosen, *top_logprobs[:num_top]), (rank, *range(1, num_top + 1))
    )
