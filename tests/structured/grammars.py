"""Feeds texts to a shape as serving would, over a vocabulary of bytes."""

from typing import Any

from llguidance import LLMatcher, LLTokenizer

from quire.structured.source import limits, source_of, validate
from quire.structured_params import StructuredOutputsParams

BYTES = LLTokenizer("byte")


def matcher(**values: Any) -> LLMatcher:
    """Raises InvalidRequestError for a shape that is refused."""
    params = StructuredOutputsParams(**values)
    source = source_of(params)
    validate(source, params)
    return LLMatcher(BYTES, source, log_level=0, limits=limits())


def accepts(start: LLMatcher, text: str) -> bool:
    """Whether the whole text is an answer."""
    one, tokens = start.deep_copy(), list(text.encode())
    return one.try_consume_tokens(tokens) == len(tokens) and one.is_accepting()
