"""Who comes first.

A policy is one total order of requests. The waiting queue is served in it, steps give their budget in it,
and the victim of a preemption is the last of it. Ties are broken by arrival, which a request keeps for
life: preempted, it goes back to the place that it had.
"""

import heapq
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from quire.core.request import Request, RequestStatus
from quire.errors import ConfigurationError, unknown_name_message

Order = tuple[int, int]
"""Smaller is earlier; no two requests have the same."""


class Policy(Protocol):
    """A total order of requests that does not change while they live."""

    def order(self, request: Request) -> Order:
        """The place of a request."""


class Fcfs:
    """First come, first served."""

    def order(self, request: Request) -> Order:
        """By arrival alone."""
        return 0, request.arrival_index


class Priority:
    """The lower number first; first come, first served among equals."""

    def order(self, request: Request) -> Order:
        """By priority, then by arrival."""
        return request.new.priority, request.arrival_index


POLICIES: Mapping[str, type[Policy]] = MappingProxyType({"fcfs": Fcfs, "priority": Priority})


def make_policy(name: str) -> Policy:
    """The policy that users call `name`."""
    if name not in POLICIES:
        raise ConfigurationError(unknown_name_message("scheduling policy", name, POLICIES), field="scheduling_policy")
    return POLICIES[name]()


class WaitingQueue:
    """A heap of waiting requests: O(log n) in and out.

    A request that was aborted stays in the heap as a dead entry until it comes up, or until more than
    half of the heap is dead: then all dead ones are swept out.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Order, Request]] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def __iter__(self) -> Iterator[Request]:
        """All that wait, in no order."""
        return (request for _, request in self._heap if request.status is RequestStatus.WAITING)

    def push(self, request: Request) -> None:
        """Put a request in its place."""
        heapq.heappush(self._heap, (self._policy.order(request), request))

    def head(self) -> Request | None:
        """The first that waits, or None."""
        while self._heap and self._heap[0][1].status is not RequestStatus.WAITING:
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Remove the head. The queue must not be empty, and its head must have been looked at."""
        return heapq.heappop(self._heap)[1]

    def discard(self) -> None:
        """A request in the queue has just stopped waiting (its status says so)."""
        self._num_dead += 1
        if self._num_dead > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[1].status is RequestStatus.WAITING]
            heapq.heapify(self._heap)
            self._num_dead = 0
