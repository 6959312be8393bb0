"""Parts of a response: logprobs in both of OpenAI's shapes, finish reasons."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Raw
from msgspec.json import encode

import quire
from quire.errors import EngineDeadError, request_failure
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.server.doors.openai.bodies import ResponseOptions

FINGERPRINT = f"quire-{quire.__version__}"
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM sends this."""


def of_labels(options: ResponseOptions) -> dict[str, Any]:
    """What was done of labels that a client may count on: nothing was stored, and there is one tier."""
    tier = {} if options.service_tier is None else {"service_tier": "default"}
    return ({"store": False} if options.store else {}) | tier


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


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _best(position: PositionLogprobs, count: int) -> list[int]:
    """Token ids of the `count` most probable, best first."""
    ranked = sorted(position, key=lambda token_id: position[token_id].rank)
    return [token_id for token_id in ranked if position[token_id].rank <= count][:count]


class TokenNames:
    """How logprobs name tokens: by their text, or as `token_id:N`.

    Args:
        bytes_of: the bytes of a token.
        as_ids: name by number.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, as_ids: bool) -> None:
        self._bytes_of = bytes_of
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """The name of a token."""
        return f"token_id:{token_id}" if self._as_ids else self._bytes_of(token_id).decode(errors="replace")

    def content(self, token_id: int) -> list[int]:
        """Its bytes, as JSON has them."""
        return list(self._bytes_of(token_id))


def chat_logprobs(choice: CompletionOutput, top: int, asked: Sequence[int], names: TokenNames) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`. With `asked` (`logprob_token_ids`),
    `top_logprobs` are those tokens."""

    def entry(position: PositionLogprobs, token_id: int) -> dict[str, Any]:
        logprob = _finite(position[token_id].logprob)
        return {"token": names.name(token_id), "logprob": logprob, "bytes": names.content(token_id)}

    content = [
        _raw(
            {
                **entry(position, token_id),
                "top_logprobs": [entry(position, other) for other in asked or _best(position, top)],
            }
        )
        for token_id, position in zip(choice.token_ids, choice.logprobs or [], strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Iterable[tuple[int, PositionLogprobs | None]],
    top: int,
    asked: Sequence[int],
    offsets: list[int],
    names: TokenNames,
) -> dict[str, Any]:
    """The older shape: parallel lists. A token without logprobs (the first of a prompt) has nulls.

    Args:
        tokens: ids with their logprobs.
        top: how many best tokens to list beside the chosen one.
        asked: tokens to list instead, where a position has them (`logprob_token_ids`; a prompt's has not).
        offsets: where each token begins in the text as it is sent, in characters.
        names: of tokens.
    """
    texts: list[str] = []
    logprobs: list[float | None] = []
    best: list[Raw | None] = []
    for token_id, position in tokens:
        texts.append(names.name(token_id))
        if position is None:
            logprobs.append(None)
            best.append(None)
        else:
            others = [item for item in asked if item in position] or _best(position, top)
            shown = dict.fromkeys([token_id, *others])
            logprobs.append(_finite(position[token_id].logprob))
            best.append(_raw({names.name(item): _finite(position[item].logprob) for item in shown}))
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": best, "text_offset": offsets}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> Raw:
    """vLLM's shape: for each prompt token null or token id -> {logprob, rank, decoded_token}."""
    if positions is None:
        return _raw(None)
    return _raw([None if position is None else _raw(_of_prompt_token(position)) for position in positions])


def _of_prompt_token(position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token_id): {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": item.decoded_token}
        for token_id, item in position.items()
    }


def _raw(value: Any) -> Raw:
    """Its JSON, to stand in a larger one. Written token by token: the objects of a whole answer take ten times as much,
    and its JSON would be written in one go that no other thread can interrupt."""
    return Raw(encode(value))
