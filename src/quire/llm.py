"""`LLM` and `AsyncLLM`: an engine, and the two ways to ask it."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from quire.compose.served import compose
from quire.config import EngineArgs
from quire.engine.async_engine import AsyncEngine
from quire.engine.beam import BeamSearch
from quire.engine.chat import encode_chat
from quire.engine.front import EngineFront
from quire.engine.inputs import BYTES, ParsedRequest, Prompt
from quire.engine.queue import QueueBound, QueueConfig
from quire.engine.tools import Asked, check_held, hold, read_tools
from quire.errors import SHAPE, EngineDeadError, InvalidRequestError
from quire.outputs import RequestOutput
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

MOST_OPEN = 2
"""Sequences of a call of `LLM` that run or wait at a time, for each row: the next ones are always there."""

NOTHING_ASKED = Asked()
UNBOUNDED = QueueConfig(2**62, 2**62, 1)
Message = Mapping[str, Any]
_LENT: ContextVar[tuple[int, ...]] = ContextVar("quire_lent", default=())
"""Of the `LLM`s that are lent to what runs here: their `id`s."""


class AsyncLLM(AsyncEngine):
    """The engine for programs with an event loop: `async for output in llm.generate(prompt, params)`.

    Args: those of `EngineArgs`.

    Raises:
        ConfigurationError: an argument or a file of the model is at fault; it is named.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        super().__init__(compose(EngineArgs.from_mapping({"model": model, **engine_args})))

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "AsyncLLM":
        """The same from `EngineArgs`."""
        return cls(**{item.name: getattr(args, item.name) for item in dataclasses.fields(args)})


class LLM(EngineFront):
    """The engine for programs that have all their prompts at hand. Threads may share it: each call waits for its turn.

    Args: those of `EngineArgs`. `LLM()` is the embedded model.

    Raises:
        ConfigurationError: an argument or a file of the model is at fault; it is named.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        args = EngineArgs.from_mapping({"model": model, **engine_args})
        super().__init__(compose(args))
        self._most_open = MOST_OPEN * args.max_num_seqs
        self._lock = threading.Lock()
        """Held by the one call that uses the engine."""
        self._owner: int | None = None
        """The thread of that call."""
        self._is_whole = True
        """False while the engine is being called: an interrupt then may leave it in any state."""
        self._is_closed = False

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs in the order of the prompts. Interrupted, it drops them all.

        Args:
            prompts: text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, token ids, or a list of such. Of another
                iterable, prompts are drawn as there is room for them.
            sampling_params: one for all, one for each of a list, or None for the model's own defaults.
            use_tqdm: show a progress bar with tokens per second.
            priority: one for each of a list; lower goes first under `scheduling_policy="priority"`.

        Raises:
            InvalidRequestError: some prompt or parameter is refused; of a list, nothing was generated then. So is a
                shape with no answer as short as `max_tokens`; where others of a list have answers, its output has
                `finish_reason` error instead, and `error` says why.
            EngineDeadError: it is closed, or its core is gone for good.
        """
        return self._generate(prompts, sampling_params, priority, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; outputs in their order.

        Args:
            messages: one conversation, or a list of them; see `quire.engine.chat.encode_chat` for it and its options.
            sampling_params: as for `generate`. So is `use_tqdm`.
            tools: functions that the model may call, in OpenAI's form. The arguments of its calls are held to their
                parameters; the text is the model's own, calls and all: `answer_format.parser` reads it.

        Raises:
            InvalidRequestError: some message or parameter is refused; of a list, nothing was generated then.
        """
        is_list = isinstance(messages, Sequence)
        is_one = isinstance(messages, Sequence) and (not messages or isinstance(messages[0], Mapping))
        conversations: Iterable[Any] = [messages] if is_one else messages
        shown, asked = read_tools(tools or ())
        prompts = (
            {
                "prompt_token_ids": encode_chat(
                    self.get_tokenizer(),
                    self._served.inputs,
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template=chat_template,
                    tools=shown,
                    answers=self._served.answers,
                    chat_template_kwargs=chat_template_kwargs,
                )
            }
            for conversation in conversations
        )
        given = [*prompts] if is_list else prompts
        return self._generate(given, sampling_params, None, use_tqdm=use_tqdm, asked=Asked(asked))

    def beam_search(self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The `beam_width` most probable answers to every prompt, best first, each with its `cumulative_logprob`.

        Args:
            prompts: as for `generate`.

        Raises:
            InvalidRequestError: some prompt or parameter is refused.
        """
        given = [self._served.inputs.tokenize(prompt)[1] for prompt in _prompts_of(prompts)]
        searches = [BeamSearch(params, self.max_model_len - len(ids), self.eos_token_ids) for ids in given]
        while asked := [(ids, one) for ids, one in zip(given, searches, strict=True) if one.open]:
            rows: list[Prompt] = [[*ids, *beam.token_ids] for ids, one in asked for beam in one.open]
            outputs = iter(self.generate(rows, asked[0][1].step, use_tqdm=False))
            for _, one in asked:
                found = [next(outputs).outputs[0] for _ in one.open]
                one.advance([(choice.logprobs or [{}])[0] for choice in found])
        return [
            one.output(str(number), ids, self._served.tokenizer)
            for number, (ids, one) in enumerate(zip(given, searches, strict=True))
        ]

    def _generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        *,
        use_tqdm: bool,
        asked: Asked = NOTHING_ASKED,
    ) -> list[RequestOutput]:
        self._refuse_own()
        with self._lock:  # no `try` here: an interrupt at its line would leave the lock held
            return self._alone(prompts, params, priority, use_tqdm, asked)

    def _alone(self, prompts: Any, params: Any, priority: Any, use_tqdm: bool, asked: Asked) -> list[RequestOutput]:
        """The one call that uses the engine."""
        try:
            self._owner = threading.get_ident()
            if self._is_closed:
                raise EngineDeadError("this LLM is closed")
            requests, total = self._parse(_prompts_of(prompts), params, priority, asked)
            # With priorities all must be there from the start.
            return _answered(self._run(requests, total, None if priority else self._most_open, show_progress=use_tqdm))
        finally:
            self._owner = None

    def close(self) -> None:
        """Give back threads and memory, once a call in another thread has ended. The object cannot be used after."""
        self._refuse_own()
        with self._lock:
            self._is_closed = True
            self._served.close()

    @contextmanager
    def lend(self) -> Iterator[AsyncEngine]:
        """This engine as an `AsyncEngine`, for many callers at once; until it ends, other calls wait for their turn.

        Raises:
            EngineDeadError: it is closed.
        """
        self._refuse_own()
        with self._lock:
            if self._is_closed:
                raise EngineDeadError("this LLM is closed")
            if not self._is_whole:
                self._drop_all()
            # No bound: what is lent is asked by one program, which opens so many calls at a time.
            queue, self._engine.queue = self._engine.queue, QueueBound(UNBOUNDED, self._engine.clock)
            lent, self._is_whole = AsyncEngine(dataclasses.replace(self._served, close=lambda: None)), False
            token = _LENT.set((*_LENT.get(), id(self)))
            try:
                yield lent
            finally:
                _LENT.reset(token)
                is_healthy = lent.is_healthy
                try:
                    lent.close()
                finally:
                    lent.close()  # an interrupt may have ended the first: its thread must be gone
                self._is_whole = is_healthy
                self._drop_all()
                self._engine.queue = queue

    def _refuse_own(self) -> None:
        if id(self) in _LENT.get():
            raise InvalidRequestError("an LLM that runs a program is asked by the program alone", param="prompts")
        if self._lock.locked() and self._owner == threading.get_ident():
            raise InvalidRequestError("the prompts of a call cannot be made by another call of it", param="prompts")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse(
        self,
        prompts: list[Prompt] | Iterator[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        asked: Asked,
    ) -> tuple[Iterator[ParsedRequest], int | None]:
        """Checked requests, and their number. Those of a list are all checked before the first is returned."""
        if not isinstance(prompts, list):
            if priority is not None or not isinstance(params, SamplingParams | None):
                text = "must be one for all prompts where these are drawn one by one: make a list of them"
                name = "sampling_params" if priority is None else "priority"
                raise InvalidRequestError(f"{name} {text}", param=name)
            (one,) = self._checked_params(params, 1)
            return (self._parse_one(prompt, one, 0, asked) for prompt in prompts), None
        priorities = list(priority) if priority is not None else [0] * len(prompts)
        if len(priorities) != len(prompts):
            text = f"priority has {len(priorities)} items for {len(prompts)} prompts"
            raise InvalidRequestError(text, param="priority")
        each = zip(prompts, self._checked_params(params, len(prompts)), priorities, strict=True)
        with self._served.inputs.all_or_none():
            parsed = [self._parse_one(*item, asked) for item in each]
        return iter(parsed), len(parsed)

    def _parse_one(self, prompt: Any, params: SamplingParams, priority: int, asked: Asked) -> ParsedRequest:
        if asked.tools:
            answers = self.answer_format
            assert answers is not None, "a model with a tokenizer has a format"
            held = hold(self.get_tokenizer(), answers, asked, prompt["prompt_token_ids"], params)
            check_held(self._served.inputs, answers, held, [tool.name for tool in asked.tools])
            params = held.params
        return self._served.inputs.parse(prompt, params, priority=priority, arrival_s=self._engine.clock())

    def _checked_params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        """A checked copy of each: they may have been changed since they were made."""
        if params is None:
            params = self.get_default_sampling_params()
        given = [params] * count if isinstance(params, SamplingParams) else params
        if len(given) != count or not all(isinstance(item, SamplingParams) for item in given):
            text = f"sampling_params must be one SamplingParams, or one for each of {count} prompts"
            raise InvalidRequestError(text, param="sampling_params")
        distinct = {id(one): one for one in given}.items()
        copies = {key: dataclasses.replace(one, output_kind=RequestOutputKind.FINAL_ONLY) for key, one in distinct}
        return [copies[id(one)] for one in given]

    def _run(
        self, requests: Iterator[ParsedRequest], total: int | None, most_open: int | None, *, show_progress: bool
    ) -> list[RequestOutput]:
        """Compute requests. Only so many sequences are open at a time: what waits outside costs nothing."""
        engine, numbers = self._engine, list[int]()
        finished: dict[int, RequestOutput] = {}
        try:
            if not self._is_whole:
                self._drop_all()
            with progress_bar(total, show=show_progress) as advance:
                while True:
                    while most_open is None or engine.num_open < most_open:
                        parsed = next(requests, None)
                        if parsed is None:
                            most_open = 0
                            break
                        numbers.append(parsed.number)
                        self._is_whole = False
                        engine.add(parsed)
                        self._is_whole = True
                    if not engine.has_work:
                        return [finished[number] for number in numbers]
                    engine.channel.wait()
                    self._is_whole = False
                    outputs = engine.step()
                    self._is_whole = True
                    for number, output in outputs:
                        finished[number] = output
                        advance(output)
        except BaseException:
            self._drop_all()
            raise

    def _drop_all(self) -> None:
        """Leave nothing of a call that ended early. If this is interrupted too, the next call begins with it."""
        is_whole, self._is_whole = self._is_whole, False
        self._engine.drop_all(is_whole=is_whole)
        self._is_whole = True


def _prompts_of(prompts: Prompt | Iterable[Prompt]) -> list[Prompt] | Iterator[Prompt]:
    if isinstance(prompts, str | Mapping | BYTES):
        return [prompts]
    if not isinstance(prompts, Sequence):
        return iter(prompts)
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


def _answered(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """The outputs. InvalidRequestError where there is none but of shapes that were refused."""
    errors = [output.error or "" for output in outputs]
    if errors and all(error.startswith(SHAPE) for error in errors):
        raise InvalidRequestError(errors[0], param=SHAPE.strip())
    return outputs


@contextmanager
def progress_bar(num_prompts: int | None, *, show: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar with tokens per second, if it is to be shown. What it yields is to be called with each finished output."""
    if not show:
        yield lambda output: None
        return
    from tqdm.auto import tqdm

    start_s, num_in, num_out = time.monotonic(), 0, 0

    def advance(output: RequestOutput) -> None:
        nonlocal num_in, num_out
        num_in += len(output.prompt_token_ids)
        num_out += sum(len(item.token_ids) for item in output.outputs)
        spent_s = max(time.monotonic() - start_s, 1e-9)
        bar.set_postfix_str(f"in {num_in / spent_s:.1f} tok/s, out {num_out / spent_s:.1f} tok/s", refresh=False)
        bar.update(1)

    with tqdm(total=num_prompts, desc="Processed prompts", dynamic_ncols=True) as bar:
        yield advance
