"""A server of OpenAI's kind that computes the calls of programs. The standard library alone."""

import asyncio
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.parse import urlsplit

from quire.errors import ConfigurationError, InvalidRequestError, OverloadedError, QuireError, RequestFailedError
from quire.programs.backend import Answer, Prompt, Usage
from quire.programs.scoring import Likelihoods, Path, Tree
from quire.structured_params import StructuredOutputsParams

SILENCE_SECONDS = 600
"""A server that says nothing for this long is given up."""
MAX_ERROR_BYTES = 2**16
T = TypeVar("T")
CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
COMMON = "model max_tokens temperature top_p stop seed presence_penalty frequency_penalty logit_bias".split()
STANDARD = {
    CHAT: frozenset([*COMMON, "messages", "response_format"]),
    COMPLETIONS: frozenset([*COMMON, "prompt"]),
}
"""What OpenAI's own API takes: all that is taken for granted of a server without a description."""


class Remote:
    """A server, and one of its models.

    What the server takes is read from its `/openapi.json` (Quire, vLLM and SGLang have one). Of a server without it,
    only OpenAI's own fields are asked; what a program needs beyond them is refused by name.

    Args:
        url: such as `http://127.0.0.1:8000`; `/v1` at its end may be there.
        model: None: the server's first.
        api_key: None: none.
        fields: of bodies: what the server takes without saying so.

    Raises:
        ConfigurationError: the address is not one, or the key.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, fields: Iterable[str] = ()
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigurationError(f"a server's address is http://HOST:PORT, got {url!r}", field="url")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._name = parts.hostname
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigurationError("api_key must be printable ASCII", field="api_key")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = model
        self._fields = frozenset(fields)
        self._lock = threading.Lock()
        """Held while the server is asked for what is asked once: every thread of a batch needs it first."""
        self._description: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """The name of the model that is asked; errors as for `ask`."""
        with self._lock:
            if self._model is None:
                try:
                    self._model = str(self.ask("/v1/models")["data"][0]["id"])
                except (LookupError, TypeError) as error:
                    text = "the server names no model: Remote(url, model=...) says which to ask"
                    raise RequestFailedError(text) from error
            return self._model

    @property
    def _described(self) -> Mapping[str, Any]:
        with self._lock:
            if self._description is None:
                try:
                    self._description = self.ask("/openapi.json")
                except (InvalidRequestError, RequestFailedError):
                    self._description = {}
            return self._description

    def has_route(self, route: str) -> bool:
        """Whether the server says that it has a route; of OpenAI's own that is taken for granted."""
        return route in STANDARD or route in (self._described.get("paths") or {})

    def takes(self, route: str) -> frozenset[str]:
        """The fields that a body of this route may have."""
        try:
            post = self._described["paths"][route]["post"]
            schema = post["requestBody"]["content"]["application/json"]["schema"]
            if "$ref" in schema:
                schema = self._described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            return frozenset(schema["properties"]) | self._fields
        except (LookupError, TypeError):
            return STANDARD.get(route, frozenset()) | self._fields

    def require(self, route: str, *names: str) -> None:
        """Raises:
        InvalidRequestError: naming the first of these fields that the server does not take.
        """
        for name in names:
            if name not in self.takes(route):
                text = f"{self._name} does not take {name!r} at {route}, which this call needs"
                raise InvalidRequestError(text, param=name)

    def ask(self, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A server's answer, which is an object.

        Raises:
            QuireError: the server refused or failed, in its own words, or cannot be reached.
        """
        data = None if body is None else json.dumps(body, default=asdict).encode()
        request = urllib.request.Request(self._base + route, data)
        for name, value in self._headers.items():  # a server that redirects must not have the key sent elsewhere
            request.add_unredirected_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=SILENCE_SECONDS) as response:
                value = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise QuireError(f"no answer from {self._name}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise RequestFailedError(f"the answer of {self._name} is not JSON") from error
        if not isinstance(value, dict):
            raise RequestFailedError(f"the answer of {self._name} is not an object")
        return value


class RemoteBackend:
    """`Backend` over a server: each call is a request in a thread of its own."""

    def __init__(self, server: Remote, num_threads: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(num_threads, "quire-remote")

    def close(self) -> None:
        """Wait for no request that is still open."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def generate(self, prompt: Prompt, given: Mapping[str, Any], seed: int) -> Answer:
        """See `Backend`."""
        return await self._beside(self._generate, prompt, given, seed)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Backend`."""
        return await self._beside(self._encode, prompt)

    async def likelihoods(self, tree: Tree, usage: Usage) -> Likelihoods:
        """See `Backend`: a token a node where the server can name the tokens to look at, else a prompt an option."""
        if {"logprob_token_ids", "return_tokens_as_token_ids"} <= self._server.takes(COMPLETIONS):
            asked = [self._beside(self._children, node, tokens) for node, tokens in tree.items()]
        else:
            self._server.require(COMPLETIONS, "prompt_logprobs")
            ends = [(*node, token) for node, tokens in tree.items() for token in tokens if (*node, token) not in tree]
            asked = [self._beside(self._along, end, min(map(len, tree))) for end in ends]
        found: dict[tuple[Path, int], float] = {}
        for logprobs, spent in await asyncio.gather(*asked):
            found |= logprobs
            usage.add(spent)
        return found

    async def _beside(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _generate(self, prompt: Prompt, given: Mapping[str, Any], seed: int) -> Answer:
        route = COMPLETIONS if prompt.messages is None else CHAT
        body = self._prompt(route, prompt)
        values = dict(given)
        if values["max_tokens"] is None:
            if prompt.messages is None:
                raise InvalidRequestError("max_tokens must be a number for a text without roles", param="max_tokens")
            del values["max_tokens"]
        if "seed" in self._server.takes(route):
            values.setdefault("seed", seed)
        shape = values.pop("structured_outputs", None)
        if shape is not None:
            values |= self._shape(route, shape)
        self._server.require(route, *values)
        answer = self._server.ask(route, body | values)
        try:
            choice = answer["choices"][0]
            text = choice["text"] if prompt.messages is None else choice["message"]["content"]
            return Answer(text or "", choice.get("finish_reason"), _usage(answer))
        except (LookupError, TypeError, AttributeError) as error:
            raise RequestFailedError("the server's answer has no choices") from error

    def _prompt(self, route: str, prompt: Prompt) -> dict[str, Any]:
        if prompt.messages is None:
            return {"model": self._server.model, "prompt": prompt.text}
        conversation = prompt.conversation()
        if prompt.chat_template_kwargs:
            self._server.require(route, "chat_template_kwargs")
        if prompt.text:
            self._server.require(route, "continue_final_message", "add_generation_prompt")
        else:  # as every server has it
            del conversation["continue_final_message"], conversation["add_generation_prompt"]
        return {"model": self._server.model, **conversation}

    def _shape(self, route: str, shape: StructuredOutputsParams) -> dict[str, Any]:
        """What holds an answer to a shape, as this server calls it."""
        values = {name: value for name, value in asdict(shape).items() if value}
        if "structured_outputs" in self._server.takes(route):
            return {"structured_outputs": values}
        if [*values] != ["json"] or "response_format" not in self._server.takes(route):
            text = f"this server holds no answer to {', '.join(values)}: it does not take 'structured_outputs'"
            raise InvalidRequestError(text, param=next(iter(values)))
        schema = {"name": "answer", "schema": json.loads(values["json"]), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not self._server.has_route(TOKENIZE):
            raise InvalidRequestError("the server has no /tokenize, which select needs", param=TOKENIZE)
        given = {"prompt": prompt.text} if prompt.messages is None else prompt.conversation()
        tokens = self._server.ask(TOKENIZE, {"model": self._server.model, **given}).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise RequestFailedError("the server's answer to /tokenize has no tokens")
        return tuple(tokens)

    def _children(self, node: Path, tokens: list[int]) -> tuple[dict[tuple[Path, int], float], Usage]:
        asks = {"logprobs": 0, "logprob_token_ids": tokens, "return_tokens_as_token_ids": True}
        choice, usage = self._scored(node, asks)
        try:
            found = choice["logprobs"]["top_logprobs"][0]
            return {(node, token): float(found[f"token_id:{token}"]) for token in tokens}, usage
        except (LookupError, TypeError, ValueError) as error:
            raise RequestFailedError("the server's answer lacks log-probabilities that were asked for") from error

    def _along(self, path: Path, start: int) -> tuple[dict[tuple[Path, int], float], Usage]:
        choice, usage = self._scored(path, {"prompt_logprobs": 0})
        try:
            each = choice["prompt_logprobs"]
            places = range(start, len(path))
            found = {(path[:at], path[at]): float(each[at][str(path[at])]["logprob"]) for at in places}
        except (LookupError, TypeError, ValueError) as error:
            raise RequestFailedError("the server's answer lacks log-probabilities that were asked for") from error
        return found, usage

    def _scored(self, path: Path, asks: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        body = {"model": self._server.model, "prompt": list(path), "max_tokens": 1, "temperature": 0.0, **asks}
        answer = self._server.ask(COMPLETIONS, body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise RequestFailedError("the server's answer has no choices")
        return choices[0], _usage(answer)


def _usage(answer: Mapping[str, Any]) -> Usage:
    usage = answer.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Usage(1, usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, cached)


def _refusal(error: urllib.error.HTTPError) -> QuireError:
    """The server's refusal as the exception that it would be here."""
    text = f"the server answered {error.code}"
    try:
        found = json.loads(error.read(MAX_ERROR_BYTES))["error"]
        text = str(found["message"] if isinstance(found, dict) else found)[:1000] or text
    except (OSError, ValueError, LookupError, TypeError):
        pass
    if error.code in (429, 503):
        wait = error.headers.get("retry-after") or "1"
        return OverloadedError(text, retry_after_s=int(wait) if wait.isdecimal() else 1)
    return InvalidRequestError(text) if 400 <= error.code < 500 else RequestFailedError(text)
