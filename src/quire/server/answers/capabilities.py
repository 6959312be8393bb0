"""What a model can do, in the words that Ollama has for it."""

from contextlib import suppress
from typing import TYPE_CHECKING

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine


def capabilities_of(engine: "AsyncEngine") -> list[str]:
    """completion; tools, where the chat template shows them; thinking, where the model reasons."""
    template, answers = None, engine.answer_format
    with suppress(InvalidRequestError):  # no tokenizer
        template = engine.get_tokenizer().tools_template
    reasons = answers is not None and answers.reasoning is not None
    return ["completion", *(["tools"] if template else []), *(["thinking"] if reasons else [])]
