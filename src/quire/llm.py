"""`LLM` and `AsyncLLM`: an engine, and the two ways to ask it."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from quire.compose.served import compose
from quire.config import EngineArgs
from quire.engine.async_engine import AsyncEngine
from quire.engine.chat import encode_chat
from quire.engine.inputs import ParsedRequest, Prompt
from quire.engine.progress import Progress
from quire.errors import InvalidRequestError
from quire.outputs import Decision, Metric, RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.text.tokenizer import Tokenizer

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


class LLM:
    """The engine for programs that have all their prompts at hand.

    Args: those of `EngineArgs`. `LLM()` is the embedded model.

    Raises:
        ConfigurationError: an argument or a file of the model is at fault; it is named.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        self._served = compose(EngineArgs.from_mapping({"model": model, **engine_args}))
        self._engine = self._served.engine

    @property
    def decisions(self) -> list[Decision]:
        """What was decided at start, and why."""
        return self._served.decisions

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._served.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._served.limits.vocab_size

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
        """Answer a conversation, or each of a list of them; see `quire.engine.chat.encode_chat` for the options.

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

    def get_metrics(self) -> list[Metric]:
        """All metrics now."""
        return self._engine.get_metrics()

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
            with Progress(len(parsed), show=show_progress) as progress:
                while self._engine.has_work:
                    self._engine.wait()
                    for number, output in self._engine.step():
                        finished[number] = output
                        progress.advance(output)
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
