"""What each open request has been given, so that another core can go on with it; and who is to blame for a death.

A core that died may have died of a request. The same request would kill the next one as well, at the very place at
which it enters, for a step that is repeated computes the same. So those who are under suspicion enter a new core one
by one, and the next only when the one before has given a token. If the core dies meanwhile, the one that was
entering is to blame, and those who stood beside it are not. A request that is to blame for two deaths fails.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quire.core.plan import TokenDelta
from quire.core.request import Given, NewRequest

MOST_DEATHS = 2
MOST_ENTRANCES = 32
"""Many suspects enter in groups, so that there are no more entrances than this."""


@dataclass(slots=True)
class Entry:
    """One open request. `is_sent` and what follows are of the present core alone."""

    new: NewRequest
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    num_deaths: int = 0
    """Deaths that it is to blame for."""
    has_run: bool = False
    """It had entered an earlier core."""
    is_sent: bool = False
    has_entered: bool = False
    """It has, or had, a row."""
    is_cleared: bool = False
    """It has given a token, so the step with which it entered is over."""

    @property
    def is_in_doubt(self) -> bool:
        """Whether the step that runs now may be the one with which it enters."""
        return self.has_entered and not self.is_cleared

    def resumed(self) -> NewRequest:
        """The request as the next core should see it."""
        given = Given(tuple(self.output_token_ids), self.num_prompt_logprobs, self.num_cached_tokens)
        return replace(self.new, given=given)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a death."""

    failed: tuple[str, ...]
    """Requests that are to blame for their second death."""
    num_kept: int
    """Requests that go on in the next core."""
    is_explained: bool
    """Those who failed were entering: they, and not the engine, are what is wrong."""


class Journal:
    """All open requests, in the order of their arrival. Pure: no clock, no process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._suspects: dict[str, Entry] = {}
        """Those to blame for a death who have not been cleared since."""
        self._group_size = 1
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
        self._suspects.pop(request_id, None)
        if entry is None or not entry.is_sent:
            return False
        self.num_sent -= 1
        return True

    def take_unsent(self) -> list[NewRequest]:
        """Those that may be sent to the core now: they count as sent."""
        if not self._unsent:
            return []
        ready = list(self._unsent.values())
        if self._suspects:
            ready = [entry for entry in ready if entry.has_run and entry.new.request_id not in self._suspects]
            free = self._group_size - sum(entry.is_sent for entry in self._suspects.values())
            ready += [entry for entry in self._suspects.values() if not entry.is_sent][: max(0, free)]
        for entry in ready:
            entry.is_sent = True
            del self._unsent[entry.new.request_id]
        self.num_sent += len(ready)
        return [entry.resumed() for entry in ready]

    def enter(self, request_ids: Iterable[str]) -> None:
        """The core is about to begin a step with which these enter."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.has_entered = True

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
                    entry.is_cleared = True
                    self._suspects.pop(delta.request_id, None)
            if delta.finish_reason is not None:
                self.remove(delta.request_id)
        return tuple(kept)

    def core_died(self) -> Verdict:
        """The core is gone: who fails, who goes on."""
        blamed, is_explained = self._blamed()
        for entry in blamed:
            entry.num_deaths += 1
        failed = tuple(entry.new.request_id for entry in blamed if entry.num_deaths >= MOST_DEATHS)
        for request_id in failed:
            self.remove(request_id)
        for entry in self._entries.values():
            entry.has_run |= entry.has_entered
            entry.is_sent = entry.has_entered = entry.is_cleared = False
        self._unsent = dict(self._entries)
        self._suspects = {name: entry for name, entry in self._entries.items() if entry.num_deaths}
        self._group_size = -(-max(1, len(self._suspects)) // MOST_ENTRANCES)
        self.num_sent = 0
        return Verdict(failed, len(self._entries), is_explained and bool(failed))

    def _blamed(self) -> tuple[list[Entry], bool]:
        """Those who were entering under suspicion; else those who were entering; else all who ran."""
        ran = [entry for entry in self._entries.values() if entry.has_entered]
        entering = [entry for entry in ran if entry.is_in_doubt]
        suspects = [entry for entry in entering if entry.num_deaths]
        return suspects or entering or ran, bool(entering)
