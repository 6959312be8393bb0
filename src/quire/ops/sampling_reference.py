"""How one row of logits becomes one token. Order, as vLLM's: temperature, min_p, top_k, top_p, Gumbel maximum.

1. Temperature 0: the largest logit, the lowest id among equals. Otherwise `s = (logit - max) / temperature`:
   its maximum is 0, so no temperature overflows.
2. min_p: keep `s >= log(min_p)`, which is `p >= min_p * p_max`.
3. top_k: of these keep the k largest; among equals the lower ids; exactly k.
4. top_p: of these, most probable first (among equals the lower ids), keep a token while the mass before it is
   less than top_p of the mass of all that step 3 kept. At least one stays. exp in float32, sums in float64.
5. Draw by the Gumbel-max trick (arXiv 1411.0030): the largest `s + g` among the kept, with
   `g = -log(-log1p(-v))`, `v = min((float32(x) + 1/2) 2^-32, 1 - 2^-24)`, and x a word of Philox4x32-10
   (Salmon et al., SC'11): key = the row's seed, counter = (position low, position high, token_id // 4,
   STREAM), lane token_id % 4. (`v` keeps 32 bits near 0, where the large values of g come from.)

The noise of a token depends on seed, position and token id only: not on other rows, nor on what was kept.
A token with logit -inf is never sampled; a row without any finite logit gives 0 (`rows_finite` is there to find
those first).
"""

import math
from typing import Any

from quire.ops.types import Array, SampleBatch

STREAM = 0x51554952
_WORD = 0xFFFFFFFF


def sample_row(xp: Any, logits: Array, batch: SampleBatch, row: int, seed: int) -> int:
    """The token of one row; `logits [vocabulary]`."""
    temperature = float(batch.temperature[row])
    if temperature == 0.0:
        return int(xp.argmax(logits))
    scaled = (logits - xp.max(logits)) / temperature
    kept = kept_tokens(xp, scaled, int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row]))
    noise = gumbel(xp, seed, int(batch.positions[row]), logits)
    return int(xp.argmax(xp.where(kept, scaled + noise, -math.inf)))


def kept_tokens(xp: Any, scaled: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """bool `[vocabulary]`: steps 2 to 4 for `scaled [vocabulary]`, whose maximum is 0."""
    kept = scaled > -math.inf
    if min_p > 0.0:
        kept = kept & (scaled >= math.log(min_p))
    if top_k == 0 and top_p >= 1.0:
        return kept
    scaled = xp.where(kept, scaled, -math.inf)
    order = xp.argsort(scaled, descending=True, stable=True)
    place = xp.argsort(order)
    if top_k > 0:
        kept = kept & (place < top_k)
    if top_p < 1.0:
        mass = xp.astype(xp.where(kept, xp.exp(scaled), 0.0), xp.float64)
        ranked = xp.take(mass, order)
        before = xp.cumulative_sum(ranked) - ranked
        kept = kept & (xp.take(before < top_p * xp.sum(mass), place) | (place == 0))
    return kept


def gumbel(xp: Any, seed: int, position: int, like: Array) -> Array:
    """Standard Gumbel noise, float32, for each token id of `like [vocabulary]`."""
    size = like.shape[0]
    zeros = xp.zeros_like(like, dtype=xp.int64)[: -(-size // 4)]
    counter = (
        zeros + (position & _WORD),
        zeros + (position >> 32 & _WORD),
        xp.cumulative_sum(zeros + 1) - 1,
        zeros + STREAM,
    )
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    x = xp.reshape(xp.stack(words, axis=-1), (-1,))[:size]
    v = (xp.astype(x, xp.float32) + 0.5) * 2.0**-32
    v = xp.where(v < 1.0 - 2.0**-24, v, 1.0 - 2.0**-24)
    return -xp.log(-xp.log1p(-v))


def philox(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Philox4x32-10 in int64 arrays that hold 32-bit words. A product that wraps to a negative number still
    has the right bits, so masks give both of its words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3
