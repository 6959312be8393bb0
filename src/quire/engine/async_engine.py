"""`AsyncEngine`: the engine in a thread of its own beside an event loop.

::

    event loop                               engine thread
    generate() -- parse, post Add ---------> add to the core
       |                                     step, step, step ...
       await stream  <--- outputs, one call_soon_threadsafe a step for each loop
       closed early -- post Abort ---------> free its blocks
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from quire.engine.chat import encode_chat
from quire.engine.engine import Engine, NumberedOutput
from quire.engine.explain import Explanation
from quire.engine.inputs import InputProcessor, ParsedRequest, Prompt, RequestLimits
from quire.engine.queue_bound import ANYBODY, Caller
from quire.engine.stream import Stream
from quire.engine.timeline import RequestTimes
from quire.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    QuireError,
    RequestFailedError,
    internal_fault_message,
)
from quire.outputs import Decision, Metric, RequestOutput
from quire.sampling_params import SamplingParams
from quire.text.tokenizer import Tokenizer

INLINE_PROMPT_CHARACTERS = 2048
"""Prompts up to this long are tokenised on the event loop: it takes less time than a thread's hand-over."""

logger = logging.getLogger("quire")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Add:
    parsed: ParsedRequest
    stream: Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    parsed: ParsedRequest


@dataclass(frozen=True, slots=True)
class _Check:
    done: "Future[None]"


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """What an `AsyncEngine` is made of."""

    engine: Engine
    inputs: InputProcessor
    tokenizer: Tokenizer | None
    limits: RequestLimits
    decisions: list[Decision]
    default_params: Mapping[str, Any]
    """Sampling defaults of the model's `generation_config.json`."""
    close: Callable[[], None]


class AsyncEngine:
    """Serves many callers at once: every step computes whatever requests there are."""

    def __init__(self, served: ServedEngine) -> None:
        self._served = served
        self._engine = served.engine
        self._commands: deque[_Add | _Abort | _Check] = deque()
        """The first is under way: it leaves when it is done."""
        self._lock = threading.Lock()
        """Held where `_commands` grows, and where `_stopping` and `_dead` are read with it or changed."""
        self._stopping = False
        self._dead: Exception | None = None
        self._streams: dict[int, Stream] = {}
        self._text_worker = ThreadPoolExecutor(1, thread_name_prefix="quire-text")
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._served.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._served.limits.vocab_size

    @property
    def decisions(self) -> list[Decision]:
        """What was decided at start, and why."""
        return self._served.decisions

    @property
    def is_healthy(self) -> bool:
        """False once the engine's thread has stopped: this process can serve nothing any more."""
        return self._dead is None and self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """False also while a core that died is being replaced: requests then wait for the new one."""
        return self.is_healthy and self._engine.is_ready

    @property
    def has_work(self) -> bool:
        """True while a request has not had its last output."""
        return bool(self._commands) or self._engine.has_work

    def check(self) -> None:
        """State the invariants of the core, in the engine's thread; only while there is no work."""
        command = _Check(Future())
        self._post(command)
        command.done.result()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequestError: the model has none.
        """
        if self._served.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer")
        return self._served.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """`SamplingParams` with the model's own defaults."""
        return SamplingParams.from_mapping(self._served.default_params)

    def get_metrics(self) -> list[Metric]:
        """All metrics now."""
        return self._engine.get_metrics()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        self._served.inputs.check_text_size(text)
        encode = self.get_tokenizer().encode
        if len(text) <= INLINE_PROMPT_CHARACTERS:
            return encode(text, add_special_tokens=add_special_tokens)
        return await self._beside(encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation; options are those of `quire.engine.chat.encode_chat`."""
        return await self._beside(encode_chat, self.get_tokenizer(), self._served.inputs, messages, **options)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        caller: Caller = ANYBODY,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come; `sampling_params.output_kind` says what each holds.

        Closing the iterator early, or cancelling the task that reads it, aborts the request. A reader who is slower
        than the engine gets fewer and larger outputs.

        Args:
            caller: who asks: callers share the engine fairly, and the queue.
            timeout_s: seconds from now to the last output, in the queue and while it runs.

        Raises:
            InvalidRequestError: the request is refused; nothing was queued.
            OverloadedError: the queue is full; nothing was queued.
            DeadlineExceededError: `timeout_s` passed.
            EngineDeadError: the engine stopped.
        """
        parse = self._served.inputs.parse
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        options: dict[str, Any] = dict(
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            arrival_s=self._engine.clock(),
            caller=caller,
        )
        if isinstance(prompt, str) and len(prompt) > INLINE_PROMPT_CHARACTERS:
            parsed = await self._beside(parse, prompt, sampling_params, **options)
        else:
            parsed = parse(prompt, sampling_params, **options)
        core_ids = tuple(new.request_id for new in parsed.sequences)
        self._engine.queue.enter(caller, len(parsed.sequences[0].prompt_token_ids), core_ids)
        stream, finished = Stream(parsed), False
        try:
            self._post(_Add(parsed, stream))
            while not finished:
                output = await stream.get(deadline_s)
                finished = output.finished
                yield output
        except QuireError:
            finished = True  # the engine's own word, and its last
            raise
        except TimeoutError as error:
            raise DeadlineExceededError(f"the request did not end within its timeout of {timeout_s:g} s") from error
        finally:
            for core_id in core_ids:
                self._engine.queue.left(core_id, was_scheduled=False)
            if not finished and self._dead is None:
                self._post(_Abort(parsed))

    def check_room(self, caller: Caller = ANYBODY) -> None:
        """Refuse at once, before any work, what the queue has no place for.

        Raises:
            OverloadedError: the queue is full.
        """
        self._engine.queue.check_room(caller)

    def expect_callers(self, weights: Mapping[str, int]) -> None:
        """Who is known to call, with their weights: each has its share of the queue."""
        self._engine.queue.expect(weights)

    def explain(self, request_id: str) -> list[Explanation]:
        """Where the time of a request went; empty when it is not remembered."""
        return self._engine.explain(request_id)

    def mark_sent(self, response_id: str, caller: str, received_s: float, sent_s: float) -> list[RequestTimes]:
        """A server is done with a response: when it received the request, and when the last byte had left."""
        return self._engine.timelines.sent(response_id, caller, received_s, sent_s)

    async def shutdown(self) -> None:
        """Stop: requests that still run end with `EngineDeadError`. Calling it again does nothing."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        """`shutdown`, for callers without a loop."""
        with self._lock:
            self._stopping = True
        self._engine.wake()
        self._thread.join()
        self._text_worker.shutdown(wait=False, cancel_futures=True)

    async def _beside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_worker, lambda: function(*args, **kwargs))

    def _post(self, command: _Add | _Abort | _Check) -> None:
        with self._lock:
            if self._dead is not None or self._stopping:
                raise EngineDeadError("the engine has stopped")
            self._commands.append(command)
        self._engine.wake()

    def _run(self) -> None:
        failure: Exception = EngineDeadError("the engine was shut down")
        try:
            while self._take_commands():
                try:
                    self._deliver(self._engine.step())
                except OverloadedError as error:
                    self._fail_all(error)
        except BaseException as error:  # nobody may wait for a thread that is gone
            logger.exception("the engine stopped")
            failure = EngineDeadError(f"the engine stopped: {type(error).__name__}")
        with self._lock:
            self._dead = failure
            waiting = list(self._commands)
            self._commands.clear()
        for command in waiting:
            if isinstance(command, _Add):
                _call(command.stream.loop, command.stream.put, failure)
            elif isinstance(command, _Check):
                command.done.set_exception(failure)
        self._fail_all(failure)
        self._served.close()

    def _take_commands(self) -> bool:
        """Wait while there is nothing to do; False when the engine is to stop."""
        self._engine.wait()
        with self._lock:
            if self._stopping:
                return False
        for _ in range(len(self._commands)):
            self._obey(self._commands[0])
            self._commands.popleft()
        return True

    def _obey(self, command: _Add | _Abort | _Check) -> None:
        if isinstance(command, _Add):
            self._add(command)
        elif isinstance(command, _Abort):
            self._streams.pop(command.parsed.number, None)
            self._engine.abort(command.parsed)
        else:
            try:
                self._engine.check()
                command.done.set_result(None)
            except Exception as error:  # noqa: BLE001 -- raised where the check was asked for
                command.done.set_exception(error)

    def _add(self, command: _Add) -> None:
        try:
            self._engine.add(command.parsed)
        except Exception as error:
            if not isinstance(error, QuireError):
                logger.exception("a request could not be added")
            told = error if isinstance(error, QuireError) else RequestFailedError(internal_fault_message(error))
            self._engine.abort(command.parsed)
            _call(command.stream.loop, command.stream.put, told)
        else:
            self._streams[command.parsed.number] = command.stream

    def _fail_all(self, error: Exception) -> None:
        """End every open stream with `error`."""
        for stream in self._streams.values():
            _call(stream.loop, stream.put, error)
        self._streams.clear()

    def _deliver(self, outputs: list[NumberedOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, RequestOutput]]] = {}
        for number, output in outputs:
            stream = self._streams.get(number)
            if stream is None:
                continue  # aborted: nobody reads it any more
            by_loop.setdefault(stream.loop, []).append((stream, output))
            if output.finished:
                del self._streams[number]
        for loop, items in by_loop.items():
            _call(loop, _put_all, items)


def _put_all(items: list[tuple[Stream, RequestOutput]]) -> None:
    for stream, output in items:
        stream.put(output)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
