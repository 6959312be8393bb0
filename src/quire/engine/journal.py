"""What each open request has been given, so that another core can go on with it; and who is to blame for a death.

A core that died by itself may have died of a request, which would kill the next one as well, at the same token: what
is computed again is the same. So who was present is a suspect, and is tried: alone in the next core, until it has
gone past the point where it stood. If this core dies too, it is known of whom: the request that is present, alone, in
a second death fails, and nothing is held against the others. Who stands its trial waits for the trials of the others;
then all go on. A core that somebody killed from outside says little about requests: all go on at once, and only those
that were present in two such deaths are tried.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quire.core.plan import TokenDelta
from quire.core.request import NewRequest, ResumeState

MOST_DEATHS = 3
"""Requests that were present in so many deaths, and stood every trial, fail together: nothing tells them apart."""
MOST_TRIALS = 32
"""Many suspects are tried in groups, so that there are no more trials than this; a death leaves one of the groups."""
TRIAL_TOKENS = 2
"""One as all that is known is computed again, and one as the last token goes in alone: both ways of computing."""
LONGER_TRIAL = 8
"""Who stood a trial and is suspected again is tried for so many times more tokens."""


@dataclass(slots=True)
class Entry:
    """One open request. `is_sent` and what follows are of the present core alone."""

    new: NewRequest
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    num_deaths: int = 0
    """Deaths of cores in which it had a row, less those that another is to blame for."""
    num_trials: int = 0
    """Trials that it stood."""
    trial_ends_at: int | None = None
    """On trial: until it has been given so many tokens in all."""
    is_sent: bool = False
    has_entered: bool = False
    """It has, or had, a row."""
    is_cleared: bool = False
    """It has given a token, so the step with which it entered is over."""

    def resumed(self) -> NewRequest:
        """The request as the next core should see it. A trial ends there as if no more had been asked for."""
        resume = ResumeState(tuple(self.output_token_ids), self.num_prompt_logprobs, self.num_cached_tokens)
        return replace(self.new, resume=resume, max_tokens=self.trial_ends_at or self.new.max_tokens)

    @property
    def is_at_end_of_trial(self) -> bool:
        """And more was asked for."""
        return len(self.output_token_ids) == self.trial_ends_at != self.new.max_tokens

    def leave_core(self) -> None:
        """The core does not have it any more."""
        self.trial_ends_at, self.is_sent, self.has_entered, self.is_cleared = None, False, False, False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a death."""

    failed: tuple[str, ...]
    """Requests that end with it."""
    num_kept: int
    """Requests that go on in the next core."""
    is_narrowed: bool
    """Only some of the suspects were present: they, and not the engine, are what is wrong."""
    is_found: bool
    """It is known of which request the core died. It fails."""


class Journal:
    """All open requests, in the order of their arrival. Pure: no clock, no process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._trials: deque[tuple[str, ...]] = deque()
        """Who is to be tried, in this order; then all others are sent."""
        self._on_trial: set[str] = set()
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
        self._on_trial.discard(request_id)
        if entry is None or not entry.is_sent:
            return False
        self.num_sent -= 1
        return True

    def take_unsent(self) -> list[NewRequest]:
        """Those that may be sent to the core now: they count as sent."""
        while self._trials and not self._on_trial:
            self._on_trial = {name for name in self._trials.popleft() if name in self._unsent}
            for name in self._on_trial:
                entry = self._entries[name]
                end = len(entry.output_token_ids) + TRIAL_TOKENS * LONGER_TRIAL**entry.num_trials
                entry.trial_ends_at = min(end, entry.new.max_tokens)
        if not self._unsent:
            return []
        names = [name for name in self._unsent if name in self._on_trial] if self._on_trial else list(self._unsent)
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
                entry.has_entered = True

    def take(self, deltas: Iterable[TokenDelta]) -> tuple[TokenDelta, ...]:
        """News from the core; returned are those of open requests. That a trial ended is nobody's news."""
        kept = []
        for delta in deltas:
            entry = self._entries.get(delta.request_id)
            if entry is None:
                continue
            entry.num_prompt_logprobs += len(delta.prompt_logprobs)
            if delta.token_ids:
                if not entry.output_token_ids:
                    entry.num_cached_tokens = delta.num_cached_tokens
                entry.output_token_ids += delta.token_ids
                entry.is_cleared = True
            if delta.finish_reason == "length" and entry.is_at_end_of_trial:
                self._acquit(entry)
                delta = delta._replace(finish_reason=None)
            kept.append(delta)
            if delta.finish_reason is not None:
                self.remove(delta.request_id)
        return tuple(kept)

    def core_died(self, *, by_itself: bool) -> Verdict:
        """The core is gone: who fails, who goes on. `by_itself`: nobody killed it from outside."""
        present = [entry for entry in self._entries.values() if entry.has_entered]
        for entry in present:
            entry.num_deaths += 1
        is_found = len(present) == 1 and present[0].num_deaths > 1
        is_narrowed = not is_found and bool(present) and bool(self._on_trial)
        if is_found or is_narrowed:
            failed = present if is_found else []
            suspects = [] if is_found else present
        else:
            failed = [entry for entry in present if entry.num_deaths >= MOST_DEATHS]
            suspects = [entry for entry in present if by_itself or entry.num_deaths > 1]
        for entry in failed:
            self.remove(entry.new.request_id)
        names = [entry.new.request_id for entry in sorted(suspects, key=lambda entry: entry.is_cleared)]
        if not present:
            names = [*self._on_trial, *(name for group in self._trials for name in group)]
        for entry in self._entries.values():
            entry.leave_core()
            if is_found:
                entry.num_deaths = entry.num_trials = 0
        self._unsent, self.num_sent = dict(self._entries), 0
        self._on_trial = set()
        size = -(-max(1, len(names)) // MOST_TRIALS)
        self._trials = deque(tuple(names[start : start + size]) for start in range(0, len(names), size))
        return Verdict(tuple(entry.new.request_id for entry in failed), len(self._entries), is_narrowed, is_found)

    def _acquit(self, entry: Entry) -> None:
        """It stood its trial, and goes on when all are over."""
        entry.leave_core()
        entry.num_trials += 1
        self.num_sent -= 1
        self._on_trial.discard(entry.new.request_id)
        self._unsent[entry.new.request_id] = entry
        if not self._trials and not self._on_trial:
            self._unsent = {name: self._entries[name] for name in self._entries if name in self._unsent}
