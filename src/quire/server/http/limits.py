"""The limits of the server in one table: value, unit and the error past it; `quire serve --limit NAME=VALUE` sets one.

Parser, schema and docs/guide/limits.md go by it. What holds for the library too is checked by `SamplingParams` and the
engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from quire.errors import ConfigurationError, unknown_name_message
from quire.server.http.errors import ApiError

LARGEST = 2**40
MAX_TIMEOUT_SECONDS = 86400
TRUSTED_TEMPLATE_CHARACTERS = 2**16
"""Of a chat template in a request, where such are trusted. They are not by default: to compile and run one may take a
second of a thread that tokenises for all callers."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound of the server. `error` makes the refusal that names it."""

    what: str
    value: int
    unit: str
    status: int
    code: str
    param: str | None = None

    def error(self, got: str = "", place: str | None = None) -> ApiError:
        """The refusal. `got` says how much came, where that is known."""
        text = f"{self.what} is limited to {self.value:,} {self.unit}" + (f", got {got}" if got else "")
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else None
        return ApiError(self.status, text, param=self.param or place, code=self.code, headers=headers)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one server."""

    body_bytes: Limit = Limit("the request body", 8 * 2**20, "bytes", 413, "request_too_large")
    body_seconds: Limit = Limit("sending the request body", 30, "seconds", 408, "request_timeout")
    body_values: Limit = Limit("the request body", 2**19, "values", 413, "too_many_values")
    body_names: Limit = Limit("the request body", 2**16, "names and lists", 413, "too_many_names")
    all_bodies_bytes: Limit = Limit("what is read of requests at one time", 2**28, "bytes", 503, "overloaded")
    requests: Limit = Limit("what is answered at one time", 4096, "requests", 503, "overloaded")
    connections: Limit = Limit("what is open at one time", 8192, "connections", 503, "overloaded")
    prompts: Limit = Limit("prompt", 128, "prompts in one request", 400, "too_many_prompts", "prompt")
    sequences: Limit = Limit("n times the prompts", 256, "sequences in one request", 400, "too_many_sequences", "n")
    logprobs: Limit = Limit(
        "logprobs times tokens times sequences", 2**18, "log-probabilities in one request", 400, "too_many_logprobs"
    )
    stop_characters: Limit = Limit("stop", 2**15, "characters in all", 400, "stop_too_long", "stop")
    bad_word_characters: Limit = Limit(
        "bad_words times the sequences", 2**18, "characters in all", 400, "bad_words_too_long", "bad_words"
    )
    messages: Limit = Limit("messages", 2048, "messages", 400, "too_many_messages", "messages")
    content_parts: Limit = Limit("the content of a message", 1024, "parts", 400, "too_many_parts", "messages")
    label_characters: Limit = Limit("a label", 512, "characters", 400, "label_too_long")
    template_arguments: Limit = Limit(
        "chat_template_kwargs", 64, "names", 400, "too_many_template_arguments", "chat_template_kwargs"
    )
    template_argument_depth: Limit = Limit(
        "chat_template_kwargs", 8, "levels of nesting", 400, "template_arguments_too_deep", "chat_template_kwargs"
    )
    tools: Limit = Limit("tools", 128, "tools", 400, "too_many_tools", "tools")
    tool_characters: Limit = Limit("tools", 2**17, "characters of JSON in all", 400, "tools_too_long", "tools")
    documents: Limit = Limit("documents", 1024, "documents", 400, "too_many_documents", "documents")
    chat_template_characters: Limit = Limit(
        "chat_template (for --trust-request-chat-template)", 0, "characters", 400, "chat_template_not_trusted",
        "chat_template",
    )  # fmt: skip
    prompt_tokens: Limit = Limit("a prompt", 2**31 - 1, "tokens", 400, "prompt_too_long")
    detokenized_tokens: Limit = Limit("tokens", 2**17, "token ids in one request", 400, "too_many_tokens", "tokens")
    input_items: Limit = Limit("input", 2048, "items, earlier turns included", 400, "too_many_items", "input")
    input_bytes: Limit = Limit(
        "what an input goes on from, and what it refers to,", 2**25, "bytes", 413, "input_too_large", "input"
    )
    chained_responses: Limit = Limit(
        "previous_response_id", 256, "responses before this one", 400, "chain_too_long", "previous_response_id"
    )
    background_responses: Limit = Limit(
        "background", 64, "responses of one key at one time", 429, "too_many_responses", "background"
    )
    added_items: Limit = Limit("items", 20, "items in one request", 400, "too_many_added_items", "items")
    file_bytes: Limit = Limit("a file", 2**26, "bytes", 413, "file_too_large", "file")
    files: Limit = Limit("what is stored of one key", 1000, "files", 429, "too_many_files", "file")
    batch_lines: Limit = Limit("a batch", 50_000, "lines", 400, "too_many_lines", "input_file_id")
    batches: Limit = Limit("what runs of one key", 100, "batches", 429, "too_many_batches", "input_file_id")
    batch_lines_at_once: Limit = Limit(
        "what runs of the batches of one key for one model", 32, "lines at one time", 503, "overloaded"
    )

    def for_queue(self, most: int) -> "Limits":
        """These limits, with room for so many requests of each of several callers that run and wait."""
        more = {"requests": 4 * most, "connections": 8 * most}
        return self.with_values({name: max(value, getattr(self, name).value) for name, value in more.items()})

    def within(self, most_connections: int) -> "Limits":
        """These limits, with no more than so many connections, of which some are always idle and can be closed."""
        connections = min(self.connections.value, most_connections)
        requests = max(1, min(self.requests.value, connections * 3 // 4))
        return self.with_values({"connections": connections, "requests": requests})

    def with_values(self, values: Mapping[str, int]) -> "Limits":
        """These limits, some of them set anew.

        Raises:
            ConfigurationError: an unknown name, or a value that is no limit.
        """
        known = [item.name for item in fields(self)]
        for name, value in values.items():
            if name not in known:
                raise ConfigurationError(unknown_name_message("limit", name, known), field="limit")
            if not 1 <= value <= LARGEST:
                raise ConfigurationError(f"the limit {name} must be between 1 and {LARGEST}", field="limit")
        return replace(self, **{name: replace(getattr(self, name), value=value) for name, value in values.items()})


INLINE_BODY_BYTES = 2**16
"""Larger bodies are parsed off the event loop."""
RETRY_AFTER_SECONDS = 1
SLOW_READER_SECONDS = 60
"""An answer whose reader takes nothing for this long is cut off, so that it cannot hold memory or cache blocks."""
HEADER_BYTES = 64 * 2**10
"""Request line and headers together; past it the connection is closed with 400."""
HEADER_SECONDS = 30
"""From the opening of a connection, or from the first byte after an answer, to the end of a request's headers."""
KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 30
"""After SIGTERM, running requests have this long to finish."""
