"""Parts of a response: logprobs in both of OpenAI's shapes, usage, finish reasons."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import quire
from quire.errors import EngineDeadError, RequestFailedError
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput

FINGERPRINT = f"quire-{quire.__version__}"
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM sends this."""


def check_finish(output: RequestOutput, choice: CompletionOutput) -> str | None:
    """The finish reason for the wire.

    Raises:
        RequestFailedError: the sequence ended with an error.
        EngineDeadError: the engine cut it off.
    """
    if choice.finish_reason == "error":
        raise RequestFailedError(output.error or "this request failed while it ran")
    if choice.finish_reason == "abort":
        raise EngineDeadError("the request was cut off")
    return choice.finish_reason


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    """OpenAI's usage; `cached_tokens` None leaves the details out."""
    counted: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        counted["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return counted


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _best(position: PositionLogprobs, count: int) -> list[int]:
    """Token ids of the `count` most probable, best first."""
    ranked = sorted(position, key=lambda token_id: position[token_id].rank)
    return [token_id for token_id in ranked if position[token_id].rank <= count][:count]


def chat_logprobs(choice: CompletionOutput, top: int, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""

    def entry(position: PositionLogprobs, token_id: int) -> dict[str, Any]:
        item = position[token_id]
        return {"token": item.decoded_token, "logprob": _finite(item.logprob), "bytes": list(bytes_of(token_id))}

    content = [
        {**entry(position, token_id), "top_logprobs": [entry(position, other) for other in _best(position, top)]}
        for token_id, position in zip(choice.token_ids, choice.logprobs or [], strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Iterable[tuple[int, PositionLogprobs | None]], top: int, offset: int, text_of: Callable[[int], str]
) -> dict[str, Any]:
    """The older shape: parallel lists. A token without logprobs (the first of a prompt) has nulls.

    Args:
        tokens: ids with their logprobs.
        top: how many best tokens to list beside the chosen one.
        offset: where the text of this part starts, in characters of the tokens' own texts.
        text_of: a token's text where its logprobs do not say it.
    """
    texts: list[str] = []
    logprobs: list[float | None] = []
    best: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, position in tokens:
        offsets.append(offset)
        if position is None:
            texts.append(text_of(token_id))
            logprobs.append(None)
            best.append(None)
        else:
            texts.append(position[token_id].decoded_token)
            logprobs.append(_finite(position[token_id].logprob))
            shown = [position[item] for item in dict.fromkeys([token_id, *_best(position, top)])]
            best.append({item.decoded_token: _finite(item.logprob) for item in shown})
        offset += len(texts[-1])
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": best, "text_offset": offsets}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[Any] | None:
    """vLLM's shape: for each prompt token null or token id -> {logprob, rank, decoded_token}."""
    if positions is None:
        return None
    return [
        position
        and {
            str(token_id): {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": item.decoded_token}
            for token_id, item in position.items()
        }
        for position in positions
    ]
