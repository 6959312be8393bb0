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
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from quire.engine.chat import encode_chat, texts_in
from quire.engine.engine import Outputs
from quire.engine.front import EngineFront, ServedEngine
from quire.engine.inputs import BadWords, ParsedRequest, Prompt
from quire.engine.observer import Observer
from quire.engine.queue import ANYBODY, Caller
from quire.engine.stream import Stream
from quire.engine.text_work import TextWork
from quire.engine.tools import Asked, HeldAnswer, check_held, hold, is_known_good
from quire.errors import (
    DeadlineExceededError,
    EngineDeadError,
    OverloadedError,
    QuireError,
    RequestFailedError,
    internal_fault_message,
)
from quire.outputs import Explanation, RequestOutput
from quire.sampling_params import SamplingParams

INLINE_CHARACTERS = 2048
"""Texts up to this long are worked on in the event loop: it takes less time than a thread's hand-over."""
MESSAGE_CHARACTERS = 64
"""What a message costs in a template, in characters that are tokenised."""
MOST_FAULTS_IN_A_ROW = 6
"""Faults of the engine's thread without any output in between after which it gives up: twice as many as a request may
be there in (`quire.engine.engine.MOST_FAULTS`), so that one bad request ends before the engine does."""

logger = logging.getLogger("quire")

T = TypeVar("T")


class _Command(NamedTuple):
    """For the engine's thread: `run`, or `fail` when the engine has stopped before."""

    run: Callable[[], object]
    fail: Callable[[Exception], object]


class AsyncEngine(EngineFront):
    """Serves many callers at once: every step computes whatever requests there are.

    Its methods may be called from any thread and from any event loop. What is unexpected in the engine's own thread is
    taken for a death of the core: another one computes on, and requests lose nothing.
    """

    def __init__(self, served: ServedEngine) -> None:
        super().__init__(served)
        self._commands: deque[_Command] = deque()
        """The first is being executed: it is removed when it is done."""
        self._lock = threading.Lock()
        """Held where `_commands` grows, and where `_stopping` and `_dead` are read with it or changed."""
        self._stopping = False
        self._dead: Exception | None = None
        self._streams: dict[int, Stream] = {}
        self._num_faults = 0
        """Since the last output."""
        self._is_faulty = False
        """The engine must be mended before it is called again."""
        self._text_work = TextWork()
        self._shape_work: TextWork | None = None
        """Compiling what answers are held to may take seconds, and keeps no text waiting."""
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """False once the engine's thread has stopped: this process can serve nothing any more."""
        return self._dead is None and self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """False also while a core that died is being replaced: requests then wait for the new one."""
        return self.is_healthy and self._engine.channel.is_ready

    @property
    def has_work(self) -> bool:
        """True while a request has not had its last output."""
        return bool(self._commands) or self._engine.has_work

    def check(self) -> None:
        """State the invariants of the core, in the engine's thread; only while there is no work."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                self._engine.channel.check()
                done.set_result(None)
            except Exception as error:  # noqa: BLE001 -- raised where the check was asked for
                done.set_exception(error)

        self._post(run, done.set_exception)
        done.result()

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, suffix: str = "", caller: Caller = ANYBODY
    ) -> list[int]:
        """Token ids of a text; with `suffix` of one that has a gap before it, for the answer to fill."""
        encode = partial(self._served.inputs.encode, text, add_special_tokens=add_special_tokens, suffix=suffix)
        return await self.beside(encode, len(text) + len(suffix), caller)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, caller: Caller = ANYBODY, **options: Any
    ) -> list[int]:
        """Token ids of a conversation; options are those of `quire.engine.chat.encode_chat`."""
        answers, inputs = self._served.answers, self._served.inputs
        encode = partial(encode_chat, self.get_tokenizer(), inputs, messages, answers=answers, **options)
        size = sum(map(len, texts_in([messages, options.get("documents") or (), options.get("tools") or ()])))
        return await self._text_work.run(encode, size + MESSAGE_CHARACTERS * len(messages), caller)

    async def hold(
        self,
        params: SamplingParams,
        asked: Asked,
        prompt_token_ids: Sequence[int],
        *,
        names: Sequence[str] = (),
        caller: Caller = ANYBODY,
    ) -> HeldAnswer:
        """How answers to a conversation are held to what is asked, and read.

        Args:
            params: their shape is held behind the reasoning.
            names: of all tools, in the order of the request.

        Raises:
            InvalidRequestError: it cannot be held; a tool whose parameters are at fault is named.
        """
        tokenizer, answers = self.get_tokenizer(), self.answer_format
        assert answers is not None, "a model with a tokenizer has a format"
        make = partial(hold, tokenizer, answers, asked, prompt_token_ids, params)
        held = await self.beside(make, len(prompt_token_ids), caller, first=True)  # the prompt tells of every tool
        inputs = self._served.inputs
        if (asked.tools or held.shape) and not is_known_good(inputs, held.params):
            await self._beside_shapes(partial(check_held, inputs, answers, held, names), caller)
        return held

    async def encode_bad_words(self, params: SamplingParams, *, caller: Caller = ANYBODY) -> BadWords:
        """The bad words of some parameters, for all the requests that they are given with."""
        size = sum(map(len, params.bad_words or ()))
        return await self.beside(partial(self._served.inputs.encode_bad_words, params), size, caller)

    async def beside(self, function: Callable[[], T], size: int, caller: Caller = ANYBODY, *, first: bool = False) -> T:
        """The result of `function`, which works on text: called here if that is short, else in a thread beside the
        event loop, where callers take turns.

        Args:
            size: characters or tokens.
            first: before other work of this caller, since it ends what holds memory.
        """
        if size <= INLINE_CHARACTERS:
            return function()
        return await self._text_work.run(function, size, caller, first=first)

    async def _checked(self, params: SamplingParams, caller: Caller) -> SamplingParams:
        """Parameters may have been changed since they were made, and a shape must be known before it is parsed."""
        params, inputs = replace(params), self._served.inputs
        if not inputs.knows_shape(params):
            await self._beside_shapes(partial(inputs.grammar_source, params), caller)
        return params

    async def _beside_shapes(self, work: Callable[[], object], caller: Caller) -> None:
        if self._shape_work is None:
            self._shape_work = TextWork(tells_long=False)
        await self._shape_work.run(work, 0, caller)

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
        bad_words: BadWords | None = None,
        is_background: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come; `sampling_params.output_kind` says what each holds.

        Closing the iterator early, or cancelling the task that reads it, aborts the request. A reader that is slower
        than the engine gets fewer and larger outputs.

        Args:
            caller: callers share the engine fairly, and the queue.
            timeout_s: seconds from now to the last output, in the queue and while it runs.
            bad_words: what `encode_bad_words` gave for `sampling_params`; None: that is done here.
            is_background: it is computed while no other request runs.

        Raises:
            InvalidRequestError: the request is refused; nothing was queued.
            OverloadedError: the queue is full; nothing was queued.
            DeadlineExceededError: `timeout_s` passed.
            EngineDeadError: the engine stopped.
        """
        sampling_params = await self._checked(sampling_params, caller)
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        options: dict[str, Any] = dict(request_id=request_id, priority=priority, cache_salt=cache_salt, caller=caller)
        options |= dict(arrival_s=self._engine.clock(), bad_words=bad_words, is_background=is_background)
        parse = partial(self._served.inputs.parse, prompt, sampling_params, **options)
        parsed = await self.beside(parse, _size_of_text(prompt, sampling_params, bad_words), caller)
        core_ids = tuple(new.request_id for new in parsed.sequences)
        self._engine.queue.enter(caller, len(parsed.sequences[0].prompt_token_ids), core_ids)
        stream, finished = Stream(parsed), False
        try:
            self._post(partial(self._add, parsed, stream), partial(_call, stream.loop, stream.put))
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
            if not finished:
                with suppress(EngineDeadError):  # it has dropped everything
                    self._post(partial(self._drop, parsed), lambda _: None)

    def check_room(self, caller: Caller = ANYBODY) -> None:
        """Refuse at once, before any work, what the queue has no place for.

        Raises:
            OverloadedError: the queue is full.
        """
        self._engine.queue.check_room(caller)

    def expect_callers(self, weights: Mapping[str, int]) -> None:
        """Name the callers that are known in advance, with weights: each has its share of the queue."""
        self._engine.queue.expect(weights)

    def explain(self, request_id: str) -> list[Explanation]:
        """Where the time of a request went; empty when it is not remembered."""
        return self._engine.observer.explain(request_id, self._engine.clock())

    @property
    def observer(self) -> Observer:
        """What counts and explains the engine's work."""
        return self._engine.observer

    async def shutdown(self) -> None:
        """Stop: requests that still run end with `EngineDeadError`. Calling it again does nothing."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        """`shutdown`, for callers without a loop."""
        with self._lock:
            self._stopping = True
        self._engine.channel.wake()
        self._thread.join()
        self._text_work.close()
        if self._shape_work is not None:
            self._shape_work.close()

    def _post(self, run: Callable[[], object], fail: Callable[[Exception], object]) -> None:
        with self._lock:
            if self._dead is not None or self._stopping:
                raise EngineDeadError("the engine has stopped")
            self._commands.append(_Command(run, fail))
        self._engine.channel.wake()

    def _run(self) -> None:
        failure: Exception = EngineDeadError("the engine was shut down")
        try:
            while self._serve_once():
                pass
        except BaseException as error:  # no caller may wait for a thread that has ended
            logger.exception("the engine stopped")
            failure = EngineDeadError(f"the engine stopped: {type(error).__name__}")
        with self._lock:
            self._dead = failure
            waiting = list(self._commands)
            self._commands.clear()
        for command in waiting:
            command.fail(failure)
        self._fail_all(failure)
        self._served.close()

    def _serve_once(self) -> bool:
        """Commands, and what the core has computed; False when the engine is to stop.

        Raises:
            Exception: the last of so many faults that there is no hope.
        """
        try:
            if self._is_faulty:
                self._is_faulty = False
                self._deliver(self._engine.mend(self._streams))
            if not self._take_commands():
                return False
            outputs = self._engine.step()
            self._num_faults = 0 if outputs else self._num_faults
            self._deliver(outputs)
        except OverloadedError as error:
            self._fail_all(error)
        except Exception:
            self._num_faults += 1
            if self._num_faults >= MOST_FAULTS_IN_A_ROW:
                raise
            logger.exception("a fault in the engine's thread: the core starts anew, and requests go on")
            self._is_faulty = True
            self._engine.channel.wake()
        return True

    def _take_commands(self) -> bool:
        """Wait while there is nothing to do; False when the engine is to stop."""
        self._engine.channel.wait()
        with self._lock:
            if self._stopping:
                return False
        for _ in range(len(self._commands)):
            try:
                self._commands[0].run()
            finally:
                self._commands.popleft()
        return True

    def _add(self, parsed: ParsedRequest, stream: Stream) -> None:
        try:
            self._engine.add(parsed)
        except Exception as error:
            if not isinstance(error, QuireError):
                logger.exception("a request could not be added")
            reported = error if isinstance(error, QuireError) else RequestFailedError(internal_fault_message(error))
            try:
                self._engine.abort(parsed)
            finally:
                _call(stream.loop, stream.put, reported)
        else:
            self._streams[parsed.number] = stream

    def _drop(self, parsed: ParsedRequest) -> None:
        self._streams.pop(parsed.number, None)
        self._engine.abort(parsed)

    def _fail_all(self, error: Exception) -> None:
        """End every open stream with `error`."""
        for stream in self._streams.values():
            _call(stream.loop, stream.put, error)
        self._streams.clear()

    def _deliver(self, outputs: Outputs) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, RequestOutput]]] = {}
        for number, output in outputs:
            stream = self._streams.get(number)
            if stream is None:
                continue  # aborted: its reader has left
            by_loop.setdefault(stream.loop, []).append((stream, output))
            if output.finished:
                del self._streams[number]
        for loop, items in by_loop.items():
            if not _call(loop, _put_all, items):
                for stream, _ in items:
                    self._drop(stream.parsed)


def _put_all(items: list[tuple[Stream, RequestOutput]]) -> None:
    for stream, output in items:
        stream.put(output)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> bool:
    """Whether the loop will call: one that is closed, or closes at this moment, has no readers any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
        return True
    return False


def _size_of_text(prompt: Prompt, params: SamplingParams, bad_words: BadWords | None) -> int:
    """What parsing a request works on, in characters."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    texts = [text] if isinstance(text, str) else []
    words = params.bad_words or () if bad_words is None else ()
    return sum(map(len, [*texts, *words]))
