"""The memory and the batches of engines before PagedAttention, on the same requests and the same model of time.

Memory is taken in one piece when a request enters, as Orca takes it in the comparison of the paper on PagedAttention
(arXiv 2309.06180, section 6 and figure 2): `reserve-max` for the longest possible sequence, `reserve-pow2` for the
answer's length rounded up to a power of two, `reserve-oracle` for the length that it will have, which no engine knows.
Batches are `continuous` (Orca, OSDI 2022: a request enters and leaves at any step) or `static`: the next batch enters
when the longest answer of this one has ended, and those that have ended are computed along with it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.limits import SchedulerConfig
from quire.core.plan import ScheduledRow
from quire.observe.replay import Asked
from quire.observe.simulate import MemoryUse, Outcome, Times
from quire.observe.step_cost import StepCost

RESERVATIONS = ("reserve-max", "reserve-pow2", "reserve-oracle")
BATCHINGS = ("continuous", "static")


def reserved_tokens(request: Asked, scheme: str, max_model_len: int) -> int:
    """Tokens that are set aside for a request when it enters."""
    if scheme == "reserve-max":
        return max_model_len
    if scheme == "reserve-pow2":
        return min(request.prompt + (1 << (request.num_output - 1).bit_length()), max_model_len)
    return request.prompt + request.num_output


@dataclass(slots=True)
class _Running:
    request: Asked
    reserved: int
    num_computed: int = 0
    num_output: int = 0

    @property
    def has_ended(self) -> bool:
        return self.num_output >= self.request.num_output

    def next_row(self, row: int, budget: int) -> ScheduledRow:
        known = self.request.prompt + min(self.num_output, self.request.num_output - 1)
        num = min(max(known - self.num_computed, 1), budget)
        return ScheduledRow(row, self.num_computed, num, (), self.num_computed + num >= known)


def simulate_reserved(
    config: SchedulerConfig, requests: Sequence[Asked], cost: StepCost, scheme: str, batching: str
) -> Outcome:
    """Let requests run, first come, first served.

    Args:
        config: its rows, budget, longest sequence, and `num_blocks * block_size` tokens of memory hold here too.
        requests: in the order of their arrival.
    """
    capacity = config.num_blocks * config.block_size
    outcome, coming, waiting = Outcome(memory=MemoryUse()), deque(requests), deque[Asked]()
    running: list[_Running] = []
    now_s = start_s = requests[0].arrival_s if requests else 0.0
    while coming or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            request = coming.popleft()
            outcome.num_prompt_tokens += request.prompt
            if request.prompt + request.num_output > config.max_model_len or config.max_model_len > capacity:
                outcome.num_refused += 1
                continue
            outcome.times[request.number] = Times(request.arrival_s)
            waiting.append(request)
        if batching == "continuous" or not running:
            _admit(running, waiting, config, scheme, capacity)
        if running:
            now_s = _step(running, config, cost, outcome, now_s)
            ended = [one for one in running if one.has_ended]
            if batching == "continuous" or len(ended) == len(running):
                running = [one for one in running if not one.has_ended]
    outcome.duration_s = now_s - start_s
    return outcome


def _admit(running: list[_Running], waiting: deque[Asked], config: SchedulerConfig, scheme: str, capacity: int) -> None:
    held = sum(one.reserved for one in running)
    while waiting and len(running) < config.max_num_seqs:
        reserved = reserved_tokens(waiting[0], scheme, config.max_model_len)
        if held + reserved > capacity:
            return
        held += reserved
        running.append(_Running(waiting.popleft(), reserved))


def _step(running: list[_Running], config: SchedulerConfig, cost: StepCost, outcome: Outcome, now_s: float) -> float:
    budget, rows = config.max_num_batched_tokens, list[ScheduledRow]()
    for place, one in enumerate(running):
        if budget == 0:
            break
        rows.append(one.next_row(place, budget))
        budget -= rows[-1].num_tokens
    seconds = cost.seconds(rows)
    used = sum(min(one.num_computed, one.request.prompt + one.request.num_output) for one in running)
    later = sum(one.request.prompt + one.request.num_output - one.num_computed for one in running if not one.has_ended)
    assert outcome.memory is not None
    outcome.memory.add(sum(one.reserved for one in running), used, later, seconds)
    outcome.row_seconds += sum(not one.has_ended for one in running) * seconds
    outcome.num_steps += 1
    for row in rows:
        one = running[row.row]
        if one.has_ended:
            continue  # padding: it is computed for nothing
        one.num_computed += row.num_tokens
        if row.samples:
            one.num_output += 1
            outcome.times[one.request.number].took(1, now_s + seconds)
    return now_s + seconds
