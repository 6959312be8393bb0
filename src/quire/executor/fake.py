"""Answers without a model: for tests of the core, and for timing it.

`FakeExecutor` is a suspicious runner. It keeps its own copy of every row and a cache in which each slot
holds the *fingerprint* of its text: a number made of the token and all tokens before it, as real keys
and values are. Before it answers for a row it reads all slots of the row's context back, so that a wrong
block, a stale prefix hit or a slot overwritten by another row is found at the step that would have used it.

What a failed row writes is *void*, and so is all that is computed from void slots: such a row gives wrong tokens and
wrong log-probabilities without a word, as with a real device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quire.core.plan import NewRow, RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprobs

_MASK = (1 << 64) - 1
_VOID = 1 << 63
"""Flips a bit of the fingerprints that a failed row writes, and of those that are computed from them."""


def mix(state: int, value: int) -> int:
    """64 bits that depend on both numbers (the finaliser of splitmix64)."""
    state = (state * 0x9E3779B97F4A7C15 + value + 1) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


@dataclass(slots=True)
class _Row:
    new: NewRow
    token_ids: list[int]
    fingerprints: list[int]
    """Of each known token."""
    block_ids: list[int]
    has_failed: bool = False
    """What is computed for it from then on is void."""
    void: int = 0
    """`_VOID` in a step that computes the row from void slots."""
    num_computed: int | None = None
    """None before the first step of the row: where it starts is then for the plan to say."""

    def append(self, token_id: int) -> None:
        before = self.fingerprints[-1] if self.fingerprints else 0
        self.fingerprints.append(mix(before, token_id))
        self.token_ids.append(token_id)


def _never(request_id: str, position: int) -> bool:
    return False


class FakeExecutor:
    """Deterministic tokens that depend on nothing but the request: its seed and its text so far.

    Raises AssertionError when a plan is not consistent. `fails(request_id, position)` makes a row fail at
    the step that computes `position`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        vocab_size: int,
        fails: Callable[[str, int], bool] = _never,
    ) -> None:
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._fails = fails
        self._rows: dict[int, _Row] = {}
        self._cache: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]  # fingerprints
        self._has_void = False
        """Whether any row has ever failed."""
        self._num_steps = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Check the plan, compute it and return the result, which is its own handle."""
        _require(plan.step_id == self._num_steps, f"step {self._num_steps} comes next, not {plan.step_id}")
        self._num_steps += 1
        for row in plan.removed:
            _require(row in self._rows, f"row {row} is removed but was not held")
            del self._rows[row]
        for new in plan.new:
            self._enter(new)
        rows = [item.row for item in plan.scheduled]
        _require(len(set(rows)) == len(rows), "a row is scheduled twice")
        for item in plan.scheduled:
            self._write(item)
        while self._has_void and any([self._reads_void(item) for item in plan.scheduled]):
            pass  # again: rows of one step read each other
        return StepResult(plan.step_id, tuple(self._answer(item) for item in plan.scheduled))

    def collect(self, handle: StepResult) -> StepResult:
        """The result of `execute`."""
        return handle

    def run_idle_work(self) -> bool:
        """There is none."""
        return False

    def clear(self) -> None:
        """Forget all rows; steps are counted from 0 again."""
        self._rows.clear()
        self._num_steps = 0

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """What a block held is lost."""
        for first, number in runs:
            for block_id in range(first, first + number):
                self._cache[block_id] = [0] * self._block_size

    def close(self) -> None:
        """Nothing is held outside this object."""

    @property
    def num_rows(self) -> int:
        """Rows held: those entered and not yet removed."""
        return len(self._rows)

    def _enter(self, new: NewRow) -> None:
        _require(0 <= new.row < self._max_num_seqs, f"there is no row {new.row}")
        _require(new.row not in self._rows, f"row {new.row} is taken")
        row = _Row(new, [], [], list(new.block_ids))
        for token_id in new.token_ids:
            row.append(token_id)
        self._rows[new.row] = row

    def _write(self, item: ScheduledRow) -> None:
        """Put the fingerprints of the scheduled tokens into their slots."""
        _require(item.row in self._rows, f"row {item.row} is scheduled but was not entered")
        row = self._rows[item.row]
        row.block_ids.extend(item.new_block_ids)
        start, end = item.start, item.start + item.num_tokens
        if row.has_failed:  # its last token is void and unknown, and what follows is void as well
            return self._fill(row, start, min(end, len(row.token_ids)))
        _require(row.num_computed in (None, start), f"row {item.row} starts at {start}, not {row.num_computed}")
        _require(start < end <= len(row.token_ids), f"row {item.row}: [{start}, {end}) is not known")
        _require(item.samples == (end == len(row.token_ids)), f"row {item.row}: samples at its last token only")
        _require(end <= len(row.block_ids) * self._block_size, f"row {item.row} has too few blocks")
        row.num_computed = end
        fails = any(self._fails(row.new.request_id, position) for position in range(start, end))
        row.has_failed, row.void = fails, _VOID if fails else 0
        self._has_void = self._has_void or fails
        return self._fill(row, start, end)

    def _fill(self, row: _Row, start: int, end: int) -> None:
        for position in range(start, end):
            block_id = row.block_ids[position // self._block_size]
            self._cache[block_id][position % self._block_size] = row.fingerprints[position] ^ row.void

    def _reads_void(self, item: ScheduledRow) -> bool:
        """Whether a row that was thought sound has void slots in its context; then what it writes is void, too."""
        row = self._rows[item.row]
        if row.void or all(slots == expected for slots, expected in self._blocks(row, item.start)):
            return False
        context = [pair for block in self._blocks(row, item.start) for pair in zip(*block, strict=True)]
        if not any(slot == expected ^ _VOID for slot, expected in context):
            return False
        row.void = _VOID
        self._fill(row, item.start, item.start + item.num_tokens)
        return True

    def _blocks(self, row: _Row, end: int) -> Iterator[tuple[list[int], list[int]]]:
        """For each block of the tokens `[0, end)`: what its slots hold, and what they should hold."""
        for index, first in enumerate(range(0, end, self._block_size)):
            expected = row.fingerprints[first : min(first + self._block_size, end)]
            yield self._cache[row.block_ids[index]][: len(expected)], expected

    def _answer(self, item: ScheduledRow) -> RowResult:
        """Read the context back, then sample."""
        row = self._rows[item.row]
        if row.has_failed:
            return RowResult(item.row, (), error="injected fault")
        end = item.start + item.num_tokens
        for index, (slots, expected) in enumerate(self._blocks(row, end)):
            void = [fingerprint ^ row.void for fingerprint in expected]
            holds = slots == expected or all(slot in pair for slot, *pair in zip(slots, expected, void, strict=True))
            _require(holds, f"request {row.new.request_id}: block {index} holds another text")
        prompt_logprobs: Sequence[TokenLogprobs] = ()
        if row.new.sampling.num_prompt_logprobs is not None:
            prompt_logprobs = [
                _logprobs(row, position) for position in range(item.start + 1, min(end + 1, row.new.num_prompt_tokens))
            ]
        if not item.samples:
            return RowResult(item.row, (), prompt_logprobs=tuple(prompt_logprobs))
        token_id = mix(row.fingerprints[-1] ^ row.void, row.new.sampling.seed) % self._vocab_size
        row.append(token_id)
        logprobs = () if row.new.sampling.num_logprobs is None else (_logprobs(row, end),)
        return RowResult(item.row, (token_id,), logprobs, tuple(prompt_logprobs))


def _logprobs(row: _Row, position: int) -> TokenLogprobs:
    """Of the known token at `position`: a number that depends on the text up to there."""
    value = mix(row.fingerprints[position] ^ row.void, 0) % 4096
    return TokenLogprobs((row.token_ids[position],), (-value / 256,), (1,))


def _require(holds: bool, statement: str) -> None:
    if not holds:
        raise AssertionError(statement)
