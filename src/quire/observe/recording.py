"""A recording of what a scheduler was asked and what it decided, for `replay.py` and `simulate.py`.

One event a line, each an array of JSON that begins with its kind::

    start   schema, configuration, policy, prefix caching, time            the core starts: nothing is known
    add     number, what a request asks for, the grains of its prompt      a request comes
    abort   number
    plan    step, time, removed, new, scheduled, answers of the rules      `StepPlan`, with numbers for ids
    result  step, time, rows with other than one token, rows that failed
    end     number, reason, tokens generated, grains of what was generated
    clear | give_back

No text and no token is in it. Of each full block of tokens it holds a *grain*: 48 bits of a hash, keyed with a key that
is kept nowhere, of all tokens from the first to the block's last. Two requests with the same beginning have the same
grains, which is what the prefix cache goes by, and they say nothing else.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from quire.core.admission import AdmissionRule
from quire.core.limits import SchedulerConfig
from quire.core.plan import StepPlan, StepResult, TokenDelta
from quire.core.policy import Policy
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import NewRequest, Request
from quire.core.scheduler import Scheduler
from quire.errors import ConfigurationError

SCHEMA = 1
MOST_BYTES = 2**32
"""Of a file; what comes after is not recorded."""
FLUSH_S = 0.5
GRAIN_BYTES = 6
RAISED = "!"
"""The answer of a rule that raised."""

logger = logging.getLogger("quire.observe")


class RecordingFile:
    """Where events go. A disk that is full ends the recording, and nothing else.

    Raises:
        ConfigurationError: the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._flushed_s = 0.0
        try:
            # Open as long as the core is, and appended to: a core that follows one that died goes on in the same file.
            self._file: BinaryIO | None = Path(path).open("ab")  # noqa: SIM115
        except OSError as error:
            raise ConfigurationError(
                f"record: {path} cannot be written ({os.strerror(error.errno or 0)})", field="record"
            ) from error
        self._left = MOST_BYTES - self._file.tell()

    def write(self, *event: Any) -> None:
        """One event."""
        if self._file is None:
            return
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        self._left -= len(line)
        try:
            if self._left < 0:
                raise OSError("it has reached its most bytes")
            self._file.write(line)
            now_s = time.monotonic()
            if now_s - self._flushed_s > FLUSH_S:
                self.flush(now_s)
        except OSError as error:
            logger.warning("the recording ends here: %s", error)
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()

    def flush(self, now_s: float = 0.0) -> None:
        """Let others see what was written."""
        if self._file is not None:
            self._file.flush()
            self._flushed_s = now_s


class RecordedRule:
    """A rule, and what it answered in this step."""

    def __init__(self, rule: AdmissionRule, answers: list[str | None]) -> None:
        self._rule = rule
        self._answers = answers

    def ready(self, request: Request) -> str | None:
        """See `AdmissionRule.ready`."""
        self._answers.append(RAISED)
        self._answers[-1] = self._rule.ready(request)
        return self._answers[-1]


class RecordedScheduler(Scheduler):
    """A scheduler that writes down all it is asked and all it decides.

    Args:
        path: of the recording; the others as of `Scheduler`.

    Raises:
        ConfigurationError: the file cannot be written.
    """

    def __init__(
        self,
        path: str,
        config: SchedulerConfig,
        policy: Policy,
        prefix_cache: PrefixCache | NullPrefixCache,
        rules: Sequence[AdmissionRule] = (),
        policy_name: str = "fcfs",
    ) -> None:
        self._file = RecordingFile(path)
        self._key = os.urandom(32)
        self._answers: list[str | None] = []
        self._numbers: dict[str, tuple[int, Request]] = {}
        self._num_added = 0
        start = {
            "schema": SCHEMA,
            "policy": policy_name,
            "prefix_caching": isinstance(prefix_cache, PrefixCache),
            "num_rules": len(rules),
            "config": dataclasses.asdict(config),
            "time_s": time.monotonic(),
        }
        self._file.write("start", start)
        self._file.flush()
        super().__init__(config, policy, prefix_cache, [RecordedRule(rule, self._answers) for rule in rules])

    def clear(self) -> None:
        """See `Scheduler.clear`."""
        self._file.write("clear")
        self._numbers.clear()
        super().clear()

    def add(self, new: NewRequest) -> None:
        """See `Scheduler.add`."""
        super().add(new)
        number, self._num_added = self._num_added, self._num_added + 1
        request = self._requests[new.request_id]
        self._numbers[new.request_id] = number, request
        asked = {
            "prompt": len(new.prompt_token_ids),
            "given": len(new.resume.output_token_ids),
            "max_tokens": new.max_tokens,
            "priority": new.priority,
            "arrival_s": new.arrival_s,
            "caller": self._digest(new.caller.encode(errors="replace"), b"caller") if new.caller else "",
            "weight": new.caller_weight,
            "waits": new.needs_output_tokens,
            "background": new.is_background,
            "prompt_logprobs": new.sampling.num_prompt_logprobs is not None,
            "logprobs_sent": new.resume.num_prompt_logprobs,
            "cached": new.resume.num_cached_tokens,
        }
        self._file.write("add", number, asked, self._grains(request))

    def abort(self, request_id: str) -> list[TokenDelta]:
        """See `Scheduler.abort`."""
        deltas = super().abort(request_id)
        if deltas:
            self._file.write("abort", self._numbers[request_id][0])
            self._write_ends(deltas)
        return deltas

    def schedule(self, now_s: float = 0.0) -> StepPlan:
        """See `Scheduler.schedule`."""
        self._answers.clear()
        plan = super().schedule(now_s)
        numbers = {new.request_id: self._numbers[new.request_id][0] for new in plan.new}
        self._file.write("plan", plan.step_id, now_s, *events_of(plan, numbers), self._answers)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """See `Scheduler.update`."""
        # The token ids are needed after the request has left.
        deltas = super().update(plan, result)
        several = [(row.row, len(row.token_ids)) for row in result.rows if len(row.token_ids) > 1]
        failed = [row.row for row in result.rows if row.error is not None]
        self._file.write("result", plan.step_id, time.monotonic(), several, failed)
        self._write_ends(deltas)
        if not self._requests:
            self._file.flush()
        return deltas

    def give_back(self, *, keeps_cached: bool) -> list[tuple[int, int]]:
        """See `Scheduler.give_back`."""
        self._file.write("give_back", keeps_cached)
        return super().give_back(keeps_cached=keeps_cached)

    def _write_ends(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                number, request = self._numbers.pop(delta.request_id)
                grains = self._grains(request)
                self._file.write("end", number, delta.finish_reason, request.num_output_tokens, grains)

    def _grains(self, request: Request) -> list[str]:
        size, parent, found = self.config.block_size, request.new.cache_salt.encode("utf-8", "surrogatepass"), []
        for first in range(0, len(request.token_ids) - size + 1, size):
            tokens = array("I", request.token_ids[first : first + size])
            found.append(self._digest(parent + tokens.tobytes(), b"grain"))
            parent = found[-1].encode()
        return found

    def _digest(self, data: bytes, kind: bytes) -> str:
        return blake2b(data, digest_size=GRAIN_BYTES, key=self._key, person=kind).hexdigest()


def events_of(plan: StepPlan, numbers: dict[str, int]) -> tuple[Any, Any, Any]:
    """What a plan says, as it stands in a recording: removed, new and scheduled rows.

    Args:
        numbers: of the requests that enter.
    """
    new = [(item.row, numbers[item.request_id], len(item.token_ids), item.block_ids) for item in plan.new]
    return plan.removed, new, plan.scheduled
