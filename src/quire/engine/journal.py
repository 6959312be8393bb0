"""What each open request has been given, so that another core can go on with it; and who is to blame for a death.

A core that died may have died of a request, which would kill the next one as well, at the very step with which it
enters: a step that is repeated computes the same. So the requests that were entering when a core died are in doubt, or,
where none was, all that ran. In the next core they enter after the others, and all at once, for most deaths come from
outside. Who is in doubt for a second death enters one by one, each when the one before has given a token; so the next
death tells who it is. Newcomers come last. A request fails when it alone is in doubt for its second death.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quire.core.plan import TokenDelta
from quire.core.request import Given, NewRequest

MOST_DEATHS = 3
"""Requests that had all entered well in so many cores that died fail together: nothing tells them apart."""
MOST_ENTRANCES = 32
"""Many suspects enter in groups, so that there are no more entrances than this; a death leaves one of the groups."""


@dataclass(slots=True)
class Entry:
    """One open request. `is_sent` and what follows are of the present core alone."""

    new: NewRequest
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    num_deaths: int = 0
    """Deaths of cores in which it had a row, less those that another is to blame for."""
    is_in_doubt: bool = False
    """It may be to blame for a death, and has given no token since."""
    has_run: bool = False
    is_sent: bool = False
    has_entered: bool = False
    """It has, or had, a row."""
    is_cleared: bool = False
    """It has given a token, so the step with which it entered is over."""

    def resumed(self) -> NewRequest:
        """The request as the next core should see it."""
        given = Given(tuple(self.output_token_ids), self.num_prompt_logprobs, self.num_cached_tokens)
        return replace(self.new, given=given)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a death."""

    failed: tuple[str, ...]
    """Requests that end with it."""
    num_kept: int
    """Requests that go on in the next core."""
    is_narrowed: bool
    """Only some of the suspects were entering: they, and not the engine, are what is wrong."""
    is_found: bool
    """It is known of which request the core died. It fails."""


class Journal:
    """All open requests, in the order of their arrival. Pure: no clock, no process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._groups: deque[list[str]] = deque()
        """Who enters, in this order, each group when the one before is cleared; then all others."""
        self._suspects: frozenset[str] = frozenset()
        self._entering: set[str] = set()
        """Of the group that enters now: who is not cleared."""
        self.num_sent = 0
        """Requests that the present core works on, or has in its queue."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, new: NewRequest) -> None:
        """A request has come."""
        self._entries[new.request_id] = self._unsent[new.request_id] = Entry(new)

    def remove(self, request_id: str) -> bool:
        """A request has ended, or nobody wants it any more. Whether the core has it."""
        entry = self._entries.pop(request_id, None)
        self._unsent.pop(request_id, None)
        self._entering.discard(request_id)
        if entry is None or not entry.is_sent:
            return False
        self.num_sent -= 1
        return True

    def take_unsent(self) -> list[NewRequest]:
        """Those that may be sent to the core now: they count as sent."""
        while self._groups and not self._entering:
            self._entering = {name for name in self._groups.popleft() if name in self._unsent}
        if not self._unsent:
            return []
        names = [name for name in self._unsent if name in self._entering] if self._entering else list(self._unsent)
        ready = [self._unsent.pop(name) for name in names]
        for entry in ready:
            entry.is_sent = True
        self.num_sent += len(ready)
        return [entry.resumed() for entry in ready]

    def enter(self, request_ids: Iterable[str]) -> None:
        """The core is about to begin a step with which these enter."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.has_entered = entry.has_run = True

    def take(self, deltas: Iterable[TokenDelta]) -> tuple[TokenDelta, ...]:
        """News from the core; returned are those of open requests."""
        kept = []
        for delta in deltas:
            entry = self._entries.get(delta.request_id)
            if entry is None:
                continue
            kept.append(delta)
            entry.num_prompt_logprobs += len(delta.prompt_logprobs)
            if delta.token_ids:
                if not entry.output_token_ids:
                    entry.num_cached_tokens = delta.num_cached_tokens
                entry.output_token_ids += delta.token_ids
                if not entry.is_cleared:
                    entry.is_cleared, entry.is_in_doubt = True, False
                    self._entering.discard(delta.request_id)
            if delta.finish_reason is not None:
                self.remove(delta.request_id)
        return tuple(kept)

    def core_died(self) -> Verdict:
        """The core is gone: who fails, who goes on."""
        ran = [entry for entry in self._entries.values() if entry.has_entered]
        entering = [entry for entry in ran if not entry.is_cleared]
        doubtful = entering or ran
        is_narrowed = bool(entering) and all(entry.new.request_id in self._suspects for entry in entering)
        for entry in ran:
            entry.num_deaths += 1
        for entry in doubtful:
            entry.is_in_doubt = True
        is_found = len(doubtful) == 1 and doubtful[0].num_deaths > 1
        failed = doubtful if is_found else [] if entering else [one for one in ran if one.num_deaths >= MOST_DEATHS]
        for entry in failed:
            self.remove(entry.new.request_id)
        for entry in self._entries.values():
            entry.is_sent = entry.has_entered = entry.is_cleared = False
            if is_found and not entry.is_in_doubt:
                entry.num_deaths = 0
        self._unsent, self.num_sent = dict(self._entries), 0
        self._line_up()
        return Verdict(tuple(entry.new.request_id for entry in failed), len(self._entries), is_narrowed, is_found)

    def _line_up(self) -> None:
        """Who enters the next core, and in which order."""
        in_doubt = {name: entry for name, entry in self._entries.items() if entry.is_in_doubt}
        most = max((entry.num_deaths for entry in in_doubt.values()), default=0)
        suspects = [name for name, entry in in_doubt.items() if entry.num_deaths == most > 1]
        self._suspects = frozenset(suspects)
        steady = [name for name, entry in self._entries.items() if entry.has_run and name not in in_doubt]
        others = [name for name in in_doubt if name not in self._suspects]
        size = -(-max(1, len(suspects)) // MOST_ENTRANCES)
        singly = (suspects[start : start + size] for start in range(0, len(suspects), size))
        self._groups, self._entering = deque([steady, others, *singly]), set()
