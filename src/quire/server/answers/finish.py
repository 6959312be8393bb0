"""How a sequence ended."""

from quire.errors import EngineDeadError, request_failure
from quire.outputs import CompletionOutput, RequestOutput


def check_finish(output: RequestOutput, choice: CompletionOutput) -> str | None:
    """The finish reason for the wire.

    Raises:
        RequestFailedError: the sequence ended with an error.
        EngineDeadError: the engine cut it off.
    """
    if choice.finish_reason == "error":
        raise request_failure(output.error or "this request failed while it ran")
    if choice.finish_reason == "abort":
        raise EngineDeadError("the request was cut off")
    return choice.finish_reason


def mean_logprob(choice: CompletionOutput) -> float:
    """By which the best of several sequences is chosen; 0 where log-probabilities were not asked for."""
    return (choice.cumulative_logprob or 0.0) / max(1, len(choice.token_ids))
