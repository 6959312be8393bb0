"""What the result of a step means for a request."""

from quire.core.plan import TokenDelta, TokenLogprobs
from quire.core.request import Request


def ending_of(request: Request) -> tuple[str | None, int | None]:
    """`(finish_reason, stop_reason)` of a request that may end with its newest token."""
    token_ids = request.token_ids
    if token_ids[-1] in request.stop_token_ids and request.num_output_tokens > request.new.sampling.min_tokens:
        return "stop", None if token_ids[-1] in request.new.eos_token_ids else token_ids[-1]
    return "length" if len(token_ids) >= request.max_num_tokens else None, None


def unsent_prompt_logprobs(
    request: Request, start: int, logprobs: tuple[TokenLogprobs, ...]
) -> tuple[TokenLogprobs, ...]:
    """Those of positions `start + 1 ...` that were not handed out before a preemption."""
    unsent = logprobs[max(0, request.num_prompt_logprobs_sent - start) :]
    request.num_prompt_logprobs_sent += len(unsent)
    return unsent


def final_delta(request: Request, finish_reason: str, error: str | None = None) -> TokenDelta:
    """The last news of a request that ends without a token."""
    return TokenDelta(
        request.new.request_id,
        (),
        num_cached_tokens=request.num_cached,
        finish_reason=finish_reason,
        error=error,
    )
