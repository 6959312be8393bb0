"""Choosing tokens in Triton, without a sort and without a copy to the host. Defined in `ops/sampling_reference.py`.

A float's bits, with the sign folded in, are an unsigned number in the same order. A border between kept and dropped is
therefore found by bisection over 32 bits: each pass counts, or weighs, what lies above. One program reads one row.
"""

import torch
import triton
import triton.language as tl

from quire.ops.types import Logprobs, SampleBatch

TILE = 4096


@triton.jit
def _key(x):
    """A number whose unsigned order is the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _philox_word(low, high, token, key_low, key_high):
    """The word of one token: Philox4x32-10 with counter (low, high, token // 4, stream), lane token % 4."""
    c0 = low + token * 0
    c1 = high + token * 0
    c2 = token >> 2
    c3 = token * 0 + 0x51554952
    k0, k1 = key_low, key_high
    for _ in tl.static_range(10):
        m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
        m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
        h0, l0 = tl.umulhi(c0, m0), c0 * m0
        h1, l1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    lane = token & 3
    return tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))


@triton.jit
def _above(row, top, temperature, lowest, border, vocabulary, TILE: tl.constexpr):
    """How many of a row's scaled values have a key above `border` and are at least `lowest`; and their mass."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for first in range(0, vocabulary, TILE):
        at = first + tl.arange(0, TILE)
        x = (tl.load(row + at, mask=at < vocabulary, other=-float("inf")) - top) / temperature
        above = (_key(x) > border) & (x >= lowest) & (x > -float("inf"))
        count += tl.sum(above.to(tl.int32), 0)
        mass += tl.sum(tl.where(above, tl.exp(x), 0.0).to(tl.float64), 0)
    return count, mass


@triton.jit
def _largest(row, vocabulary, TILE: tl.constexpr):
    """The largest logit, and the lowest id that has it."""
    top, best = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int32)
    for first in range(0, vocabulary, TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(row + at, mask=at < vocabulary, other=-float("inf"))
        part = tl.max(x, 0)
        best = tl.where(part > top, tl.min(tl.where(x == part, at, 2147483647), 0), best)
        top = tl.maximum(top, part)
    return top, best


@triton.jit
def _count_border(row, top, temperature, lowest, top_k, vocabulary, TILE: tl.constexpr):
    """The smallest border with fewer than `top_k` above it, and how many at it are kept."""
    left, right = tl.zeros([], tl.int64), tl.full([], 4294967295, tl.int64)
    while left < right:
        middle = (left + right) // 2
        count, _ = _above(row, top, temperature, lowest, middle.to(tl.uint32), vocabulary, TILE)
        left = tl.where(count >= top_k, middle + 1, left)
        right = tl.where(count >= top_k, right, middle)
    count, _ = _above(row, top, temperature, lowest, left.to(tl.uint32), vocabulary, TILE)
    return left, top_k - count


@triton.jit
def _kept_mass(row, top, temperature, lowest, border, num_ties, vocabulary, TILE: tl.constexpr):
    """The mass of what lies above `border`, and of the first `num_ties` that lie at it."""
    _, mass = _above(row, top, temperature, lowest, border.to(tl.uint32), vocabulary, TILE)
    taken = tl.zeros([], tl.int32)
    for first in range(0, vocabulary, TILE):
        at = first + tl.arange(0, TILE)
        x = (tl.load(row + at, mask=at < vocabulary, other=-float("inf")) - top) / temperature
        equal = ((_key(x).to(tl.int64) == border) & (x >= lowest) & (x > -float("inf"))).to(tl.int32)
        kept = (equal > 0) & (taken + tl.cumsum(equal, 0) - equal < num_ties)
        mass += tl.sum(tl.where(kept, tl.exp(x), 0.0).to(tl.float64), 0)
        taken += tl.sum(equal, 0)
    return mass


@triton.jit
def _mass_border(row, top, temperature, lowest, from_border, wanted, vocabulary, TILE: tl.constexpr):
    """The smallest border, from `from_border` on, with less than `wanted` above it; and what is above it."""
    left, right = from_border, tl.full([], 4294967295, tl.int64)
    while left < right:
        middle = (left + right) // 2
        _, mass = _above(row, top, temperature, lowest, middle.to(tl.uint32), vocabulary, TILE)
        left = tl.where(mass >= wanted, middle + 1, left)
        right = tl.where(mass >= wanted, right, middle)
    _, mass = _above(row, top, temperature, lowest, left.to(tl.uint32), vocabulary, TILE)
    return left, mass


@triton.jit
def _gumbel(token, position, seed):
    """`-log(-log1p(-v))` of the definition, for each token id."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key_low, key_high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word = _philox_word(low, high, token.to(tl.uint32), key_low, key_high)
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    # log(1 - v), with what the rounding of 1 - v lost put back (Kahan's log1p)
    rest = 1.0 - v
    ratio = tl.where(rest == 1.0, 1.0, -v / tl.where(rest == 1.0, 1.0, rest - 1.0))
    return -tl.log(-tl.where(rest == 1.0, -v, tl.log(rest) * ratio))


@triton.jit
def sample_kernel(
    logits, tokens, temperatures, top_ks, top_ps, min_ps, seeds, positions, stride, vocabulary, TILE: tl.constexpr
):
    """One row: see the module and the definition."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    top, best = _largest(row, vocabulary, TILE)
    temperature = tl.load(temperatures + index)
    if (temperature > 0.0) & (top > -float("inf")):
        top_k, top_p, min_p = tl.load(top_ks + index), tl.load(top_ps + index), tl.load(min_ps + index)
        lowest = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), -float("inf"))
        count_border, num_ties = tl.zeros([], tl.int64), tl.full([], 2147483647, tl.int32)
        if top_k > 0:
            count_border, num_ties = _count_border(row, top, temperature, lowest, top_k, vocabulary, TILE)
        mass_border, mass_above = tl.zeros([], tl.int64), tl.zeros([], tl.float64)
        wanted = tl.full([], float("inf"), tl.float64)
        if top_p < 1.0:
            mass = _kept_mass(row, top, temperature, lowest, count_border, num_ties, vocabulary, TILE)
            wanted = mass * top_p.to(tl.float64)
            mass_border, mass_above = _mass_border(
                row, top, temperature, lowest, count_border, wanted, vocabulary, TILE
            )
        border = tl.maximum(count_border, mass_border)
        seed, position = tl.load(seeds + index), tl.load(positions + index)
        winner, taken = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.int32)
        for first in range(0, vocabulary, TILE):
            at = first + tl.arange(0, TILE)
            x = (tl.load(row + at, mask=at < vocabulary, other=-float("inf")) - top) / temperature
            key = _key(x).to(tl.int64)
            candidate = (x >= lowest) & (x > -float("inf"))
            equal = (candidate & (key == border)).to(tl.int32)
            rank = taken + tl.cumsum(equal, 0) - equal
            taken += tl.sum(equal, 0)
            fits_count = (border > count_border) | (rank < num_ties)
            before = mass_above + rank.to(tl.float64) * tl.exp(x).to(tl.float64)
            fits_mass = (border > mass_border) | (before < wanted)
            kept = candidate & ((key > border) | ((equal > 0) & fits_count & fits_mass))
            score = tl.where(kept, x + _gumbel(at, position, seed), -float("inf"))
            part = tl.max(score, 0)
            best = tl.where(part > winner, tl.min(tl.where(score == part, at, 2147483647), 0), best)
            winner = tl.maximum(winner, part)
    tl.store(tokens + index, best)


def sample(logits: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
    """See `Ops.sample`."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if logits.shape[0]:
        sample_kernel[(logits.shape[0],)](
            logits, tokens, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions,
            logits.stride(0), logits.shape[1], TILE=min(TILE, triton.next_power_of_2(logits.shape[1])), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return tokens


@triton.jit(do_not_specialize=["num_top"])
def logprobs_kernel(logits, ids, chosen, ranks, top_ids, top_logprobs, stride, vocabulary, num_top, TILE: tl.constexpr):
    """One row: its log-sum, the chosen token's rank, and `num_top` passes for the best ones."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    top = tl.full([], -float("inf"), tl.float32)
    for first in range(0, vocabulary, TILE):
        at = first + tl.arange(0, TILE)
        top = tl.maximum(top, tl.max(tl.load(row + at, mask=at < vocabulary, other=-float("inf")), 0))
    mine = tl.load(row + tl.load(ids + index))
    total = tl.zeros([], tl.float32)
    rank = tl.full([], 1, tl.int32)
    for first in range(0, vocabulary, TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(row + at, mask=at < vocabulary, other=-float("inf"))
        total += tl.sum(tl.exp(x - top), 0)
        rank += tl.sum((x > mine).to(tl.int32), 0)
    log_total = top + tl.log(total)
    tl.store(chosen + index, mine - log_total)
    tl.store(ranks + index, rank)
    last, last_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for place in range(0, num_top):
        best, best_id = tl.full([], -float("inf"), tl.float32), tl.full([], 2147483647, tl.int32)
        for first in range(0, vocabulary, TILE):
            at = first + tl.arange(0, TILE)
            x = tl.load(row + at, mask=at < vocabulary, other=-float("inf"))
            left = (at < vocabulary) & ((x < last) | ((x == last) & (at > last_id)))
            part = tl.max(tl.where(left, x, -float("inf")), 0)
            part_id = tl.min(tl.where(left & (x == part), at, 2147483647), 0)
            better = (part > best) | ((part == best) & (part_id < best_id))
            best_id = tl.where(better, part_id, best_id)
            best = tl.where(better, part, best)
        tl.store(top_ids + index * num_top + place, best_id)
        tl.store(top_logprobs + index * num_top + place, best - log_total)
        last, last_id = best, best_id


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """See `Ops.logprobs`."""
    rows, device = logits.shape[0], logits.device
    found = Logprobs(
        chosen=torch.empty(rows, dtype=torch.float32, device=device),
        rank=torch.empty(rows, dtype=torch.int32, device=device),
        top_ids=torch.empty((rows, num_top), dtype=torch.int32, device=device),
        top_logprobs=torch.empty((rows, num_top), dtype=torch.float32, device=device),
    )
    if rows:
        logprobs_kernel[(rows,)](
            logits, token_ids, found.chosen, found.rank, found.top_ids, found.top_logprobs, logits.stride(0),
            logits.shape[1], num_top, TILE=min(TILE, triton.next_power_of_2(logits.shape[1])), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return found
