"""Feeds texts to a shape as serving would, over a vocabulary of bytes."""

from typing import Any

from llguidance import LLMatcher, LLTokenizer

from quire.structured.source import limits, source_of, validate
from quire.structured.unique import KeyTokens, UniqueKeys
from quire.structured_params import StructuredOutputsParams

BYTES = LLTokenizer("byte")
KEY_TOKENS = KeyTokens([bytes((byte,)) for byte in range(256)])


def matcher(**values: Any) -> Any:
    """Raises InvalidRequestError for a shape that is refused."""
    params = StructuredOutputsParams(**values)
    source = source_of(params)
    validate(source, params)
    found = LLMatcher(BYTES, source, log_level=0, limits=limits())
    return found if params.yaml is None else UniqueKeys(found, KEY_TOKENS)


def accepts(start: Any, text: str) -> bool:
    """Whether the whole text is an answer."""
    one, tokens = start.deep_copy(), list(text.encode())
    return bool(one.try_consume_tokens(tokens) == len(tokens) and one.is_accepting())
