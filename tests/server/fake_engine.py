"""An engine without a model: it answers with the letters of the alphabet, one a token, from where the seed says.

Words in the prompt steer it: `slow` waits between tokens, `held` before the third until `released` is set or the engine
is dead, `fail` fails after two, `die` kills the engine.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from quire.engine.observer import Observer
from quire.engine.queue import ANYBODY, Caller
from quire.engine.tools import Asked, HeldAnswer, hold
from quire.errors import EngineDeadError, InvalidRequestError, OverloadedError, PromptTooLongError
from quire.outputs import CompletionOutput, Explanation, Logprob, Metric, PositionLogprobs, RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.text.parsers.choose import choose

VOCAB_SIZE = 256
MAX_MODEL_LEN = 512


class ByteTokenizer:
    """One token a byte."""

    bos_token_id = None
    tools_template = "{{ tools }}"
    special_token_ids = frozenset((0,))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def text_offsets(self, start: int, **options: Any) -> "ByteOffsets":
        return ByteOffsets(start)

    def prompt_offsets(self, text: str, token_ids: list[int]) -> list[int]:
        return list(range(len(token_ids)))


class ByteOffsets:
    """Of tokens that are one character each."""

    def __init__(self, start: int) -> None:
        self.place = start

    def push(self, token_ids: list[int]) -> list[int]:
        self.place += len(token_ids)
        return list(range(self.place - len(token_ids), self.place))


class FakeObserver(Observer):
    """Keeps the ids of the responses that were sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def on_sent(self, response_id: str, *times: Any) -> dict[str, Any]:
        self.sent.append(response_id)
        return {}


class FakeEngine:
    """What the server uses of `AsyncEngine`."""

    is_full = False
    stated_temperature = 0.5

    max_model_len = MAX_MODEL_LEN
    vocab_size = VOCAB_SIZE
    prefix_block_size = 4
    model_files = None
    stated_sampling: Mapping[str, Any] = {"temperature": 0.5}

    def __init__(self) -> None:
        self.is_healthy = True
        self.is_replaced = False
        self.num_running = 0
        self.num_aborted = 0
        self.num_bad_words_encoded = 0
        self.released = threading.Event()
        self.observer = FakeObserver()
        self.calls: list[dict[str, Any]] = []
        self.answer_format = choose(None, {})
        self.says: str | None = None
        """The whole of every answer, instead of letters."""

    def get_tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=self.stated_temperature)

    def get_metrics(self) -> list[Metric]:
        ended = (("finished_reason", "stop"),)
        return [
            Metric("quire:num_requests_running", "gauge", self.num_running, help="Requests that hold a row."),
            Metric("quire:generation_tokens_total", "counter", 7, help="Tokens generated."),
            Metric("quire:request_success_total", "counter", 3, help="Ended.", labels=ended),
            Metric("quire:time_to_first_token_seconds", "histogram", 3, 1.5, ((0.5, 1), (1.0, 2)), help="TTFT."),
        ]

    @property
    def is_ready(self) -> bool:
        return self.is_healthy and not self.is_replaced

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, suffix: str = "", caller: Caller = ANYBODY
    ) -> list[int]:
        return list(f"{text}{'|' * bool(suffix)}{suffix}".encode())

    async def encode_bad_words(
        self, params: SamplingParams, *, caller: Caller = ANYBODY
    ) -> tuple[tuple[int, ...], ...]:
        self.num_bad_words_encoded += bool(params.bad_words)
        return tuple(tuple(word.encode()) for word in params.bad_words or ())

    async def beside(self, function: Any, size: int, caller: Caller = ANYBODY, *, first: bool = False) -> Any:
        return await asyncio.to_thread(function) if size > 100 else function()

    async def encode_chat(
        self, messages: list[dict[str, str]], *, caller: Caller = ANYBODY, **options: Any
    ) -> list[int]:
        self.calls.append({"messages": messages, **options})
        return list("".join(f"{item['role']}: {item['content']}\n" for item in messages).encode())

    def check_room(self, caller: Caller = ANYBODY) -> None:
        if self.is_full:
            raise OverloadedError("no room", retry_after_s=3)

    def explain(self, request_id: str) -> list[Explanation]:
        return []

    def expect_callers(self, weights: dict[str, int]) -> None:
        self.weights = weights

    async def shutdown(self) -> None:
        self.is_healthy = False

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        caller: Caller = ANYBODY,
        timeout_s: float | None = None,
        bad_words: tuple[tuple[int, ...], ...] | None = None,
        is_background: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        ids = self._ids(prompt)
        text = bytes(ids).decode(errors="replace")
        given = {
            "priority": priority,
            "cache_salt": cache_salt,
            "caller": caller,
            "timeout_s": timeout_s,
            "is_background": is_background,
        }
        self.calls.append({"params": sampling_params, "bad_words": bad_words, **given})
        delta = sampling_params.output_kind is RequestOutputKind.DELTA
        sequences = [self._letters(sampling_params, index) for index in range(sampling_params.n)]
        self.num_running += 1
        finished = False
        try:
            made = [CompletionOutput(index, "", []) for index in range(len(sequences))]
            longest = max(map(len, sequences))
            for step in range(longest):
                await asyncio.sleep(0.02 if "slow" in text else 0)
                while "held" in text and step == 2 and self.is_healthy and not self.released.is_set():
                    await asyncio.sleep(0.01)
                if "die" in text and step == 2:
                    self.is_healthy = False
                if not self.is_healthy:
                    raise EngineDeadError("the engine has stopped")
                reason = "error" if "fail" in text and step == 2 else None
                for choice, letters in zip(made, sequences, strict=True):
                    _extend(choice, letters, step, sampling_params, delta=delta, reason=reason)
                finished = reason is not None or step + 1 == longest
                if delta or finished:
                    yield _output(request_id or "", ids, made, sampling_params, finished)
                if finished:
                    return
        finally:
            self.num_running -= 1
            self.num_aborted += not finished

    def _letters(self, params: SamplingParams, index: int) -> list[int]:
        return _letters(params, index) if self.says is None else list(self.says.encode())

    async def hold(
        self, params: SamplingParams, asked: Asked, prompt_token_ids: Any, *, names: Any = (), caller: Caller = ANYBODY
    ) -> HeldAnswer:
        return hold(self.get_tokenizer(), self.answer_format, asked, prompt_token_ids, params)  # type: ignore[arg-type]

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, dict):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        for item in ids:
            if not 0 <= item < VOCAB_SIZE:
                raise InvalidRequestError("prompt_token_ids must hold ids from 0 to 255", param="prompt_token_ids")
        if len(ids) >= MAX_MODEL_LEN:
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens", param="prompt")
        return ids


def _letters(params: SamplingParams, index: int) -> list[int]:
    count = params.max_tokens or 20
    first = (params.seed or 0) + index
    letters = [97 + (first + step) % 26 for step in range(count)]
    for stop in params.stop or ():
        at = bytes(letters).find(str(stop).encode())
        if at >= 0:
            letters = letters[:at]
    return letters


def _logprobs(token_id: int, count: int) -> PositionLogprobs:
    found = {token_id: Logprob(-0.5, 1, chr(token_id))}
    for rank in range(2, count + 1):
        other = 65 + rank
        found[other] = Logprob(-float(rank), rank, chr(other))
    return found


def _extend(
    choice: CompletionOutput, letters: list[int], step: int, params: SamplingParams, *, delta: bool, reason: str | None
) -> None:
    if delta:
        choice.token_ids, choice.text, choice.logprobs = [], "", None
    if step < len(letters):
        choice.token_ids = [*choice.token_ids, letters[step]]
        choice.text += chr(letters[step])
        if params.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), _logprobs(letters[step], params.logprobs)]
    if step + 1 == len(letters):
        choice.finish_reason = "stop" if params.stop or params.max_tokens is None else "length"
    choice.finish_reason = reason or choice.finish_reason


def _output(
    request_id: str, ids: list[int], made: list[CompletionOutput], params: SamplingParams, finished: bool
) -> RequestOutput:
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    if params.prompt_logprobs is not None:
        prompt_logprobs = [None, *(_logprobs(item, params.prompt_logprobs) for item in ids[1:])]
    failed = any(choice.finish_reason == "error" for choice in made)
    return RequestOutput(
        request_id,
        None,
        ids,
        [replace(item) for item in made],
        finished,
        prompt_logprobs,
        error="the row broke" if failed else None,
    )
