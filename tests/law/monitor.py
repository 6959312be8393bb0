"""Law 4: each request's events are a word of one small automaton.

::

    added --> (news)* --> final        and nothing after it
"""

from collections.abc import Iterable

from quire.outputs import RequestOutput

FINISH_REASONS = {"stop", "length", "repetition", "abort", "error"}


class OneFinalMonitor:
    """Watches the outputs of requests whose `request_id`s are all different."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.finished: dict[str, RequestOutput] = {}

    def added(self, request_id: str) -> None:
        """A request was accepted."""
        assert request_id not in self.open and request_id not in self.finished
        self.open.add(request_id)

    def saw(self, outputs: Iterable[RequestOutput]) -> None:
        """Outputs that came, in order."""
        for output in outputs:
            name = output.request_id
            assert name in self.open, f"{name}: an output before it was added or after its last"
            reasons = [item.finish_reason for item in output.outputs]
            assert all(reason is None or reason in FINISH_REASONS for reason in reasons)
            if output.finished:
                assert all(reasons), f"{name}: finished, but a sequence has no reason"
                self.open.discard(name)
                self.finished[name] = output
            else:
                assert not reasons or not all(reasons) or len(reasons) < 2 or output.outputs

    def all_ended(self) -> None:
        """Everything that was accepted has had its final output."""
        assert not self.open, f"no final output: {sorted(self.open)[:5]}"
