"""Every limit of the HTTP door in one table: value, unit, and the error that a request gets past it.

Limits of single sampling fields (`n`, `stop`, `logprobs` ...) stand in `quire.sampling_params`, and limits that
depend on the model (context length, vocabulary) in the engine; both hold for every door.
"""

from dataclasses import dataclass

from quire.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound. `error` makes the refusal that names it."""

    what: str
    value: int
    unit: str
    status: int
    code: str
    param: str | None = None

    def error(self, got: str = "") -> ApiError:
        """The refusal. `got` says how much came, where that is known."""
        text = f"{self.what} is limited to {self.value:,} {self.unit}" + (f", got {got}" if got else "")
        return ApiError(self.status, text, param=self.param, code=self.code)


BODY_BYTES = Limit("the request body", 8 * 2**20, "bytes", 413, "request_too_large")
BODY_SECONDS = Limit("sending the request body", 30, "seconds", 408, "request_timeout")
PROMPTS = Limit("prompt", 128, "prompts in one request", 400, "too_many_prompts", "prompt")
SEQUENCES = Limit("n times the number of prompts", 256, "sequences in one request", 400, "too_many_sequences", "n")
MESSAGES = Limit("messages", 2048, "messages", 400, "too_many_messages", "messages")
CONTENT_PARTS = Limit("the content of a message", 1024, "parts", 400, "too_many_parts", "messages")
LABEL_CHARACTERS = Limit("a label", 512, "characters", 400, "label_too_long")
TEMPLATE_ARGUMENTS = Limit(
    "chat_template_kwargs", 64, "names", 400, "too_many_template_arguments", "chat_template_kwargs"
)
TEMPLATE_ARGUMENT_DEPTH = Limit(
    "chat_template_kwargs", 8, "levels of nesting", 400, "template_arguments_too_deep", "chat_template_kwargs"
)

REQUESTS_IN_FLIGHT = 1024
"""Requests admitted at once, running and waiting together; past it 503 with Retry-After."""
RETRY_AFTER_SECONDS = 1
SLOW_READER_SECONDS = 60
"""A stream whose reader takes nothing for this long is aborted, so that it cannot hold cache blocks."""
HEADER_BYTES = 64 * 2**10
"""Request line and headers together; past it the connection is closed with 400."""
KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 30
"""After SIGTERM, running requests have this long to finish."""
