"""The bodies of POST /tokenize and POST /detokenize."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.limits import Limits
from quire.server.protocol.chat import Conversation, take_conversation
from quire.server.protocol.fields import DETOKENIZE, TOKENIZE, TOKENIZE_CHAT, flag, take


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """A text, or a conversation, to make tokens of."""

    model: str | None
    source: str | Conversation
    add_special_tokens: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True)
class DetokenizeCall:
    """Tokens to make text of."""

    model: str | None
    token_ids: list[int]


def parse_tokenize(body: Mapping[str, Any], limits: Limits) -> TokenizeCall:
    """Check a body: with `messages` it is a conversation, else it has a `prompt`.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    is_chat = body.get("messages") is not None
    taken = take(body, TOKENIZE_CHAT if is_chat else TOKENIZE, limits)
    source = take_conversation(taken, limits) if is_chat else taken.get("prompt")
    if not isinstance(source, str | Conversation):
        raise InvalidRequestError("prompt must be a string, or there must be messages", param="prompt")
    return TokenizeCall(
        _model(taken), source, flag(taken, "add_special_tokens", True), flag(taken, "return_token_strs", False)
    )


def parse_detokenize(body: Mapping[str, Any], limits: Limits, vocab_size: int) -> DetokenizeCall:
    """Check a body.

    Args:
        vocab_size: every id is below it.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: too many tokens.
    """
    taken = take(body, DETOKENIZE, limits)
    token_ids = taken.get("tokens")
    if not isinstance(token_ids, list):
        raise InvalidRequestError("tokens must be a list of token ids", param="tokens")
    if len(token_ids) > limits.detokenized_tokens.value:
        raise limits.detokenized_tokens.error(f"{len(token_ids):,}")
    if not all(type(item) is int and 0 <= item < vocab_size for item in token_ids):
        raise InvalidRequestError(f"tokens must hold token ids from 0 to {vocab_size - 1}", param="tokens")
    return DetokenizeCall(_model(taken), token_ids)


def _model(taken: Mapping[str, Any]) -> str | None:
    model = taken.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidRequestError("model must be a string", param="model")
    return model
