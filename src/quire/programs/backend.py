"""Who computes the calls of programs: an engine of this process here, a server in `remote.py`."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from quire.engine.async_engine import AsyncEngine
from quire.errors import request_failure
from quire.outputs import RequestOutput
from quire.programs.scoring import Likelihoods, Tree
from quire.sampling_params import RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a call goes on from: a conversation, or the text of a program without roles."""

    messages: tuple[Mapping[str, str], ...] | None
    text: str
    """Without roles all of it; else what the assistant's open turn holds."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def extended(self, text: str) -> "Prompt":
        """The same with more text at its end."""
        return replace(self, text=self.text + text)

    def conversation(self) -> dict[str, Any]:
        """As a chat template takes it. The assistant's turn is begun, or continued where it holds text."""
        messages = list(self.messages or ())
        if self.text:
            messages.append({"role": "assistant", "content": self.text})
        return {
            "messages": messages,
            "add_generation_prompt": not self.text,
            "continue_final_message": bool(self.text),
            **({"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}),
        }


@dataclass(slots=True)
class Usage:
    """Requests, and tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = 0
    """Prompt tokens that the prefix cache supplied; None where a server does not say."""

    def add(self, other: "Usage") -> None:
        """Count what another counted."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        unknown = self.cached_tokens is None or other.cached_tokens is None
        self.cached_tokens = None if unknown else (self.cached_tokens or 0) + (other.cached_tokens or 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call brought."""

    text: str
    finish_reason: str | None
    usage: Usage = field(default_factory=Usage)


class Backend(Protocol):
    """Computes. Its methods are called on one event loop, many at a time."""

    async def generate(self, prompt: Prompt, given: Mapping[str, Any], seed: int) -> Answer:
        """Go on from a prompt. `seed` is for a call that was given none."""

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt."""

    async def likelihoods(self, tree: Tree, usage: Usage) -> Likelihoods:
        """The log-probability of every token of a tree at its node; what it took is added to `usage`."""


@runtime_checkable
class LendsEngine(Protocol):
    """An engine that can be had as an `AsyncEngine` for a time: `LLM`."""

    def lend(self) -> AbstractContextManager[AsyncEngine]:
        """The engine, until the context ends."""


class EngineBackend:
    """`Backend` over an engine of this process.

    Args:
        num_open: requests at a time.
    """

    def __init__(self, engine: AsyncEngine, num_open: int) -> None:
        self._engine = engine
        self._room = asyncio.Semaphore(num_open)

    async def generate(self, prompt: Prompt, given: Mapping[str, Any], seed: int) -> Answer:
        """See `Backend`."""
        params = SamplingParams.from_mapping({**self._engine.stated_sampling, "seed": seed, **given})
        output = await self._ask(await self.encode(prompt), params)
        choice = output.outputs[0]
        return Answer(choice.text, choice.finish_reason, _usage(output))

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Backend`."""
        if prompt.messages is None:
            return tuple(await self._engine.encode(prompt.text))
        return tuple(await self._engine.encode_chat(**prompt.conversation()))

    async def likelihoods(self, tree: Tree, usage: Usage) -> Likelihoods:
        """See `Backend`."""
        params = partial(SamplingParams, max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
        asked = [self._ask(node, params(logprob_token_ids=tokens)) for node, tokens in tree.items()]
        found: dict[tuple[tuple[int, ...], int], float] = {}
        for (node, tokens), output in zip(tree.items(), await asyncio.gather(*asked), strict=True):
            usage.add(_usage(output))
            (position,) = output.outputs[0].logprobs or ({},)
            found |= {(node, token): position[token].logprob for token in tokens}
        return found

    async def _ask(self, token_ids: Sequence[int], params: SamplingParams) -> RequestOutput:
        params.output_kind = RequestOutputKind.FINAL_ONLY
        async with self._room:
            async for output in self._engine.generate({"prompt_token_ids": token_ids}, params):
                if output.error is not None:
                    raise request_failure(output.error)
            return output


def _usage(output: RequestOutput) -> Usage:
    num_out = sum(len(choice.token_ids) for choice in output.outputs)
    return Usage(1, len(output.prompt_token_ids), num_out, output.num_cached_tokens)
