"""What an engine tells of its work: `quire.observe` counts and explains it; `Observer` itself ignores it."""

from collections.abc import Mapping
from typing import Any

from quire.core.plan import StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.engine.channel import CoreHealth, Gauges
from quire.engine.inputs import ParsedRequest
from quire.engine.request_state import RequestState
from quire.errors import ConfigurationError
from quire.outputs import Explanation, Metric


class Observer:
    """Events of one engine. Its thread calls the `on_` methods but `on_sent`; any thread may call the others.

    Times are seconds of the engine's clock.
    """

    def on_request(self, parsed: ParsedRequest) -> None:
        """A request has come; the core may still refuse it."""

    def on_add(self, new: NewRequest, parsed: ParsedRequest, sequence: int, now_s: float) -> None:
        """The core has taken `parsed.sequences[sequence]`."""

    def on_step(self, record: StepRecord) -> None:
        """A step began at `record.now_s`, and the one before had ended by then."""

    def on_tokens(
        self, state: RequestState, delta: TokenDelta, now_s: float, *, is_first: bool, gap_s: float | None
    ) -> None:
        """Tokens of a sequence came. `is_first`: the request's first; `gap_s`: since the sequence's last, if any."""

    def on_end(self, state: RequestState, request_id: str, reason: str, now_s: float) -> None:
        """A sequence has ended; `request_id` is the core's. Its request has, when `state.finished`."""

    def on_output(self, parsed: ParsedRequest, now_s: float) -> None:
        """The last output of a request was made."""

    def on_core_replaced(self) -> None:
        """The core died, and another resumes its requests."""

    def on_sent(
        self, response_id: str, caller: str, received_s: float, sent_s: float, traceparent: bytes | None
    ) -> Mapping[str, Any]:
        """A server received a request, and sent the last byte of its response. Returns what its log should say.

        Args:
            response_id: the public name of the request, or of its numbered requests (`.../0`, `.../1`).
            traceparent: the header of that name (W3C Trace Context), if there was one.
        """
        return {}

    def metrics(self, gauges: Gauges, health: CoreHealth, rejected: Mapping[str, int]) -> list[Metric]:
        """All metrics now; `rejected` counts refusals by the queue's bound."""
        return []

    def explain(self, request_id: str, now_s: float) -> list[Explanation]:
        """Where the time of a request went, by its public name; empty when it is not remembered."""
        return []

    def live(self, since: int) -> Mapping[str, Any]:
        """What a live view shows now, in plain values: see `quire.observe.live`.

        Args:
            since: the `version` of what was shown last; -1: nothing was.
        """
        return {}

    def static_batches(self, max_model_len: int) -> Mapping[str, Any] | None:
        """The last requests, in continuous and in static batches; None: not known. Takes a while."""
        return None

    def trace_to(self, endpoint: str, model_name: str) -> None:
        """From now on send a trace of each request to an OpenTelemetry collector.

        Raises:
            ConfigurationError: the endpoint or the SDK is at fault, or this observer sends no traces.
        """
        raise ConfigurationError("otlp_traces_endpoint needs the package quire.observe", field="otlp_traces_endpoint")

    def close(self) -> None:
        """Send what is unsent."""
