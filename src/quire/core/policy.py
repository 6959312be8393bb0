"""Which request comes first.

A policy is one total order of requests. Steps give their budget in it, the victim of a preemption is the last of
it, and the requests of one caller are admitted in it; between callers the queue shares fairly. Ties are broken by
arrival, which a request keeps for life: preempted, it goes back to the place that it had.
"""

import heapq
from collections.abc import Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Protocol

from quire.core.fair_shares import FairShares
from quire.core.request import Request, RequestStatus
from quire.errors import ConfigurationError, unknown_name_message

Order = tuple[int, int]
"""Smaller is earlier; no two requests have the same."""
LAST = 2**62
"""Behind every priority."""


class Policy(Protocol):
    """A total order of requests that does not change while they live."""

    waits_for_held: bool
    """Whether a request that an admission rule holds also holds back those behind it."""

    def order(self, request: Request) -> Order:
        """The place of a request."""


class Fcfs:
    """First come, first served."""

    waits_for_held = False

    def order(self, request: Request) -> Order:
        """By arrival and nothing else, save for what is in the background."""
        return request.new.is_background, request.arrival_index


class Priority:
    """The lower number first; first come, first served among equals."""

    waits_for_held = False

    def order(self, request: Request) -> Order:
        """By priority, then by arrival."""
        return LAST if request.new.is_background else request.new.priority, request.arrival_index


POLICIES: Mapping[str, type[Policy]] = MappingProxyType({"fcfs": Fcfs, "priority": Priority})


def make_policy(name: str) -> Policy:
    """The policy that users call `name`. Raises ConfigurationError where there is none."""
    if name not in POLICIES:
        raise ConfigurationError(unknown_name_message("scheduling policy", name, POLICIES), field="scheduling_policy")
    return POLICIES[name]()


class _CallerQueue:
    """The waiting requests of one caller: a heap, O(log n) in and out.

    A request that was aborted stays in the heap as a dead entry until it comes up, or until more than
    half of the heap is dead: then all dead ones are swept out.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[Order, Request]] = []
        self.num_dead = 0

    def head(self) -> tuple[Order, Request] | None:
        """The first that waits."""
        while self.heap and self.heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self.heap)
            self.num_dead -= 1
        return self.heap[0] if self.heap else None

    def discard(self) -> None:
        """One has just stopped waiting."""
        self.num_dead += 1
        if self.num_dead > len(self.heap) // 2:
            self.heap = [entry for entry in self.heap if entry[1].status is RequestStatus.WAITING]
            heapq.heapify(self.heap)
            self.num_dead = 0


class WaitingQueue:
    """Waiting requests, a queue for each caller. Between callers whose first requests are of one rank (priority),
    the one that was given least comes first; within a queue, the policy's order holds."""

    def __init__(self, policy: Policy, shares: FairShares) -> None:
        self._policy = policy
        self._shares = shares
        self._queues: dict[str, _CallerQueue] = {}
        self.held: dict[str, Request] = {}
        """By id: those that wait outside the queues, since an admission rule refuses them."""

    def __len__(self) -> int:
        # A list, since other threads ask for it too.
        return sum(len(queue.heap) - queue.num_dead for queue in list(self._queues.values())) + len(self.held)

    def __iter__(self) -> Iterator[Request]:
        """All that wait, in no order."""
        entries = chain.from_iterable(queue.heap for queue in self._queues.values())
        queued = (request for _, request in entries if request.status is RequestStatus.WAITING)
        return chain(queued, self.held.values())

    def arrive(self, request: Request) -> None:
        """A request comes: its caller's claim is settled, and it takes its place."""
        self._shares.arrive(request.new.caller, self._queues)
        self.push(request)

    def push(self, request: Request) -> None:
        """Put a request in its place."""
        queue = self._queues.setdefault(request.new.caller, _CallerQueue())
        heapq.heappush(queue.heap, (self._policy.order(request), request))

    def head(self) -> Request | None:
        """The first that waits, or None."""
        best: tuple[tuple[int, int, Order], Request] | None = None
        for caller in list(self._queues):
            entry = self._queues[caller].head()
            if entry is None:
                del self._queues[caller]
                continue
            place = entry[0][0], self._shares[caller], entry[0]
            if best is None or place < best[0]:
                best = place, entry[1]
        return None if best is None else best[1]

    def pop(self, head: Request) -> None:
        """Remove what `head` has just given."""
        queue = self._queues[head.new.caller]
        heapq.heappop(queue.heap)
        if not queue.heap:
            del self._queues[head.new.caller]

    def hold(self, head: Request) -> None:
        """`head` waits outside the queues from now on."""
        self.pop(head)
        self.held[head.new.request_id] = head

    def release(self, request: Request) -> None:
        """A held request goes back to its place. A caller that had no other in the queues comes back from idleness."""
        del self.held[request.new.request_id]
        self.arrive(request)

    def discard(self, request: Request) -> None:
        """A request has just stopped waiting (its status says so)."""
        if self.held.pop(request.new.request_id, None) is not None:
            return
        queue = self._queues[request.new.caller]
        queue.discard()
        if not queue.heap:
            del self._queues[request.new.caller]
