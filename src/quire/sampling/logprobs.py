"""Log-probabilities of raw logits, as the plain values that go up."""

from collections.abc import Sequence

import numpy as np

from quire.core.plan import TokenLogprobs
from quire.ops.types import Array, Ops


def token_logprobs(ops: Ops, logits: Array, chosen: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of `logits [rows, vocabulary]`: the chosen token, then its `num_top[row]` best."""
    found = ops.logprobs(logits, ops.array(np.array(chosen, np.int32), "int32"), max(num_top))
    chosen_logprobs, ranks = ops.to_numpy(found.chosen).tolist(), ops.to_numpy(found.rank).tolist()
    top_ids, top_logprobs = ops.to_numpy(found.top_ids).tolist(), ops.to_numpy(found.top_logprobs).tolist()
    return [
        TokenLogprobs(
            (token_id, *top_ids[index][:count]),
            (chosen_logprobs[index], *top_logprobs[index][:count]),
            (ranks[index], *range(1, count + 1)),
        )
        for index, (token_id, count) in enumerate(zip(chosen, num_top, strict=True))
    ]
