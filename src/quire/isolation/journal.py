"""What each open request has output, so that another core can resume it; and which request a core died of.

A core that died by itself may have died of a request, which would kill the next core as well, at the same token: what
is computed again is the same. So each request that had a row is quarantined and probed: it runs alone in the next core
until it is past the point where it stood. If this core dies too, the death is attributed to the one present, alone, in
a second death: it fails, and nothing is held against the others. A request whose probe ended well is cleared,
and waits until all are; then all are resumed. A core that was killed from outside says little about requests: all are
resumed at once, and only those that were present in two such deaths are quarantined; it fails none but one that it
finds alone.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from quire.core.plan import TokenDelta
from quire.core.request import NewRequest, ResumeState

MOST_DEATHS = 3
"""Requests that were present in so many deaths, and that every probe cleared, fail together with one that was not from
outside."""
MOST_PROBES = 32
"""Many requests are probed in groups, so that there are no more probes than this; a death leaves one of the groups."""
PROBE_TOKENS = 2
"""One as all that is known is computed again, and one as the last token goes in alone: both ways of computing."""
LONGER_PROBE = 8
"""A request that was cleared and is quarantined again is probed for so many times more tokens."""


@dataclass(slots=True)
class Entry:
    """One open request. `is_sent` and what follows are of the present core alone."""

    new: NewRequest
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_cached_tokens: int = 0
    num_deaths: int = 0
    """Deaths of cores in which it had a row, less those that are attributed to another."""
    num_probes: int = 0
    """Probes that cleared it."""
    probe_ends_at: int | None = None
    """While it is probed: until it has so many output tokens in all."""
    is_sent: bool = False
    has_entered: bool = False
    """It has, or had, a row."""
    has_progressed: bool = False
    """It has given a token, so the step with which it entered is over."""

    def resumed(self) -> NewRequest:
        """The request as the next core should see it. A probe ends there as if `max_tokens` were reached."""
        resume = ResumeState(tuple(self.output_token_ids), self.num_prompt_logprobs, self.num_cached_tokens)
        return replace(self.new, resume=resume, max_tokens=self.probe_ends_at or self.new.max_tokens)

    @property
    def is_at_end_of_probe(self) -> bool:
        """Its probe is over, and `max_tokens` is not reached."""
        return len(self.output_token_ids) == self.probe_ends_at != self.new.max_tokens

    def leave_core(self) -> None:
        """The core does not have it any more."""
        self.probe_ends_at, self.is_sent, self.has_entered, self.has_progressed = None, False, False, False


@dataclass(frozen=True, slots=True)
class DeathReport:
    """What the death of a core means for the open requests."""

    failed: tuple[str, ...]
    """Requests that end with it."""
    num_kept: int
    """Requests that the next core resumes."""
    is_narrowed: bool
    """Only some of the quarantined requests were present: they, and not the engine, are what is wrong."""
    is_attributed: bool
    """The death is attributed to one request, which fails."""


class Journal:
    """All open requests, in the order of their arrival. Pure: no clock, no process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: dict[str, Entry] = {}
        self._probes: deque[tuple[str, ...]] = deque()
        """Groups to be probed, in this order; then all others are sent."""
        self._probing: set[str] = set()
        self.num_sent = 0
        """Requests that the present core works on, or has in its queue."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, new: NewRequest) -> None:
        """A request has come, new or resumed."""
        given = new.resume
        entry = Entry(new, list(given.output_token_ids), given.num_prompt_logprobs, given.num_cached_tokens)
        self._entries[new.request_id] = self._unsent[new.request_id] = entry

    def remove(self, request_id: str) -> bool:
        """A request has ended or was aborted. Returns whether the core has it."""
        entry = self._entries.pop(request_id, None)
        self._unsent.pop(request_id, None)
        self._probing.discard(request_id)
        if entry is None or not entry.is_sent:
            return False
        self.num_sent -= 1
        return True

    def take_unsent(self) -> list[NewRequest]:
        """Those that may be sent to the core now: they count as sent."""
        while self._probes and not self._probing:
            self._probing = {name for name in self._probes.popleft() if name in self._unsent}
            for name in self._probing:
                entry = self._entries[name]
                end = len(entry.output_token_ids) + PROBE_TOKENS * LONGER_PROBE**entry.num_probes
                entry.probe_ends_at = min(end, entry.new.max_tokens)
        if not self._unsent:
            return []
        names = [name for name in self._unsent if name in self._probing] if self._probing else list(self._unsent)
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
        """Take deltas of the core; those of open requests are returned, without the finish of a probe."""
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
                entry.has_progressed = True
            if delta.finish_reason == "length" and entry.is_at_end_of_probe:
                self._clear(entry)
                delta = delta._replace(finish_reason=None)
            kept.append(delta)
            if delta.finish_reason is not None:
                self.remove(delta.request_id)
        return tuple(kept)

    def core_died(self, *, by_itself: bool) -> DeathReport:
        """The core has exited: which requests fail, which are resumed. `by_itself`: it was not killed from outside."""
        present = [entry for entry in self._entries.values() if entry.has_entered]
        for entry in present:
            entry.num_deaths += 1
        is_attributed = len(present) == 1 and present[0].num_deaths > 1
        is_narrowed = not is_attributed and bool(present) and bool(self._probing)
        if is_attributed or is_narrowed:
            failed = present if is_attributed else []
            quarantined = [] if is_attributed else present
        else:
            failed = [entry for entry in present if by_itself and entry.num_deaths >= MOST_DEATHS]
            quarantined = [entry for entry in present if by_itself or entry.num_deaths > 1]
        for entry in failed:
            self.remove(entry.new.request_id)
        names = [entry.new.request_id for entry in sorted(quarantined, key=lambda entry: entry.has_progressed)]
        if not present:
            names = [*self._probing, *(name for group in self._probes for name in group)]
        for entry in self._entries.values():
            entry.leave_core()
            if is_attributed:
                entry.num_deaths = entry.num_probes = 0
        self._unsent, self.num_sent = dict(self._entries), 0
        self._probing = set()
        size = -(-max(1, len(names)) // MOST_PROBES)
        self._probes = deque(tuple(names[start : start + size]) for start in range(0, len(names), size))
        return DeathReport(
            tuple(entry.new.request_id for entry in failed), len(self._entries), is_narrowed, is_attributed
        )

    def _clear(self, entry: Entry) -> None:
        """It is cleared, and is resumed when all probes are over."""
        entry.leave_core()
        entry.num_probes += 1
        self.num_sent -= 1
        self._probing.discard(entry.new.request_id)
        self._unsent[entry.new.request_id] = entry
        if not self._probes and not self._probing:
            self._unsent = {name: self._entries[name] for name in self._entries if name in self._unsent}
