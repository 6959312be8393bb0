"""One step, from its making until its result is taken in."""

from dataclasses import dataclass, field

from quire.core.block_pool import BlockPool
from quire.core.plan import NewRow, ScheduledRequest, ScheduledRow, Stalled, StepRecord
from quire.core.request import Request

make = tuple.__new__
"""Makes a NamedTuple at half the cost of its constructor: for what is made once a row in every step."""


@dataclass(slots=True)
class PlannedStep:
    """What the scheduler has decided so far, for the plan and for the record; then what it must know until the result
    is there."""

    step_id: int
    budget: int
    """Tokens still to give."""
    new: list[NewRow] = field(default_factory=list)
    scheduled: list[ScheduledRow] = field(default_factory=list)
    advanced: list[ScheduledRequest] = field(default_factory=list)
    stalled: list[Stalled] = field(default_factory=list)
    victims: list[Request] = field(default_factory=list)
    owners: dict[int, Request] = field(default_factory=dict)
    """Row -> the request that the row's result belongs to."""
    registered: list[tuple[int, Request]] = field(default_factory=list)
    """Blocks that can be found since this step was scheduled, each with the request that fills it."""
    void_rows: set[int] = field(default_factory=set)
    """Rows that failed in an earlier step: what they write in this one is forgotten already."""
    given_blocks: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    failed: list[tuple[Request, str]] = field(default_factory=list)
    """Requests for which an admission rule raised, with the error of each."""
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    _greediest: str | None = None

    def enter(self, request: Request) -> None:
        """A request has taken its row and its first blocks. Raises AssertionError where it has no row."""
        if request.row is None:
            raise AssertionError(f"request {request.new.request_id} has no row")
        new = request.new
        self.given_blocks.append((new.request_id, tuple(request.block_ids)))
        self.new.append(
            NewRow(
                row=request.row,
                request_id=new.request_id,
                token_ids=tuple(request.token_ids),
                num_prompt_tokens=len(new.prompt_token_ids),
                sampling=new.sampling,
                block_ids=tuple(request.block_ids),
            )
        )

    def give(self, request: Request, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        """Schedule the next `num_tokens` of a request that has its blocks. AssertionError where it has no row."""
        row, start = request.row, request.num_computed
        if row is None:
            raise AssertionError(f"request {request.new.request_id} has no row")
        request.num_computed = end = start + num_tokens
        self.budget -= num_tokens
        samples = end == len(request.token_ids) + request.num_in_flight
        if samples:
            request.num_in_flight += 1
        self.scheduled.append(make(ScheduledRow, (row, start, num_tokens, new_block_ids, samples)))
        self.advanced.append(make(ScheduledRequest, (request.new.request_id, start, num_tokens)))
        self.owners[row] = request
        if new_block_ids:
            self.given_blocks.append((request.new.request_id, new_block_ids))

    def stall(self, request: Request, reason: str, by: str | None = None) -> None:
        """Note why a request does not advance."""
        self.stalled.append(Stalled(request.new.request_id, reason, by))

    def stall_for_budget(self, request: Request) -> None:
        """The budget is spent, most of it by the request that is named."""
        if self._greediest is None:
            self._greediest = max(self.advanced, key=lambda item: item.num_tokens).request_id
        self.stall(request, "budget", by=self._greediest)

    def record(self, now_s: float, num_running: int, num_waiting: int, pool: BlockPool) -> StepRecord:
        """What the step did, now that all is decided."""
        return StepRecord(
            step_id=self.step_id,
            now_s=now_s,
            scheduled=tuple(self.advanced),
            stalled=tuple(self.stalled),
            num_running=num_running,
            num_waiting=num_waiting,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_blocks=pool.num_blocks,
            num_prefix_queries=self.num_prefix_queries,
            num_prefix_hits=self.num_prefix_hits,
            given_blocks=tuple(self.given_blocks),
        )
