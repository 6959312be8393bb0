"""`LLM` and `AsyncLLM`: an engine, and the two ways to ask it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from quire.compose.served import compose
from quire.config import EngineArgs
from quire.engine.async_engine import AsyncEngine
from quire.engine.chat import encode_chat
from quire.engine.front import EngineFront
from quire.engine.inputs import ParsedRequest, Prompt
from quire.errors import InvalidRequestError
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

Message = Mapping[str, Any]


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
    """The engine for programs that have all their prompts at hand.

    Args: those of `EngineArgs`. `LLM()` is the embedded model.

    Raises:
        ConfigurationError: an argument or a file of the model is at fault; it is named.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        super().__init__(compose(EngineArgs.from_mapping({"model": model, **engine_args})))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs in the order of the prompts.

        Args:
            prompts: text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, token ids, or a list of such.
            sampling_params: one for all, one for each, or None for the model's own defaults.
            use_tqdm: show a progress bar with tokens per second.
            priority: one for each prompt; lower goes first under `scheduling_policy="priority"`.

        Raises:
            InvalidRequestError: some prompt or parameter is refused; then nothing was generated.
        """
        items = _prompt_list(prompts)
        params = self._params_list(sampling_params, len(items))
        priorities = list(priority) if priority is not None else [0] * len(items)
        if len(priorities) != len(items):
            raise InvalidRequestError(
                f"priority has {len(priorities)} items for {len(items)} prompts", param="priority"
            )
        parsed = [
            self._served.inputs.parse(
                prompt,
                dataclasses.replace(one, output_kind=RequestOutputKind.FINAL_ONLY),
                priority=rank,
                arrival_s=self._engine.clock(),
            )
            for prompt, one, rank in zip(items, params, priorities, strict=True)
        ]
        return self._run(parsed, show_progress=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; outputs in their order.

        Args:
            messages: one conversation, or a list of them; see `quire.engine.chat.encode_chat` for it and its options.
            sampling_params: as for `generate`. So is `use_tqdm`.

        Raises:
            InvalidRequestError: some message or parameter is refused; then nothing was generated.
        """
        one = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        prompts = [
            encode_chat(
                self.get_tokenizer(),
                self._served.inputs,
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(
            [{"prompt_token_ids": token_ids} for token_ids in prompts], sampling_params, use_tqdm=use_tqdm
        )

    def close(self) -> None:
        """Give back threads and memory. The object cannot be used after."""
        self._served.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count or not all(isinstance(item, SamplingParams) for item in params):
            raise InvalidRequestError(
                f"sampling_params must be one SamplingParams, or one for each of {count} prompts",
                param="sampling_params",
            )
        return params

    def _run(self, parsed: list[ParsedRequest], *, show_progress: bool) -> list[RequestOutput]:
        finished: dict[int, RequestOutput] = {}
        for item in parsed:
            self._engine.add(item)
        try:
            with progress_bar(len(parsed), show=show_progress) as advance:
                while self._engine.has_work:
                    self._engine.channel.wait()
                    for number, output in self._engine.step():
                        finished[number] = output
                        advance(output)
        except BaseException:
            for item in parsed:
                self._engine.abort(item)
            raise
        return [finished[item.number] for item in parsed]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


@contextmanager
def progress_bar(num_prompts: int, *, show: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar with tokens per second, if it is to be shown. What it yields is to be called with each finished output."""
    if not show:
        yield lambda output: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

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
