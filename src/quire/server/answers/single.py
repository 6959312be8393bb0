"""An answer of one sequence to one prompt, whole or as events: what doors that give one answer a request share."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from quire.engine.queue import Caller
from quire.engine.tools import AnswerParser, Asked, Event, Tool
from quire.errors import InvalidRequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.answers.counts import Counted
from quire.server.answers.finish import check_finish
from quire.server.answers.parts import Parts
from quire.server.http.context import RequestContext, ServerContext
from quire.server.http.streams import Outputs, last_outputs

Content = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What an answer goes on from."""

    token_ids: Sequence[int]
    params: SamplingParams
    parser: AnswerParser | None = None
    """Reads the answer's text; None: all of it is content."""


class SingleAnswer(ABC):
    """One answer: of a stream where the parameters ask for differences.

    Args:
        answer_id: names it to the client, in logs and in `quire explain`.
    """

    def __init__(self, context: ServerContext, request: RequestContext, answer_id: str) -> None:
        self._context, self._engine, self._request, self._id = context, context.engine, request, answer_id
        self._counted = Counted(1)
        self._parts = Parts(None)

    def headers(self) -> dict[str, str]:
        """Its id, and where its time went."""
        return {"x-request-id": self._id, "server-timing": self._counted.server_timing()}

    async def whole(self) -> bytes:
        """The answer in one piece, as JSON."""
        with self._context.gate.inside(self._name):
            (output,) = await last_outputs([await self._start()])
            content: bytes = await self._beside(partial(self._written, output), output)
            return content

    async def events(self) -> AsyncGenerator[Content, None]:
        """The answer in pieces."""
        with self._context.gate.inside(self._name):
            async with aclosing(await self._start()) as outputs:
                async for output in outputs:
                    for event in await self._beside(partial(self._made, output), output):
                        yield event

    @abstractmethod
    async def _prompt(self) -> Prompt:
        """What it goes on from."""

    @abstractmethod
    def _pieces(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> list[Content]:
        """The events of a stream that say what is new."""

    @abstractmethod
    def _content(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> Content:
        """The whole answer."""

    @property
    def _name(self) -> str:
        return f"{self._request.caller.name}/{self._id}"

    async def _start(self) -> Outputs:
        prompt = await self._prompt()
        self._parts = Parts(prompt.parser)
        return self._engine.generate(
            {"prompt_token_ids": prompt.token_ids},
            prompt.params,
            request_id=self._id,
            cache_salt=self._request.cache_salt,
            caller=self._request.caller,
            timeout_s=self._request.timeout_s,
        )

    async def _beside(self, work: Any, output: RequestOutput) -> Any:
        size = sum(len(choice.token_ids) for choice in output.outputs)
        size += len(output.prompt_token_ids) if output.finished else 0
        return await self._engine.beside(work, size, self._request.caller, first=True)

    def _made(self, output: RequestOutput) -> list[Content]:
        return self._pieces(output, *self._read(output))

    def _written(self, output: RequestOutput) -> bytes:
        return msgspec.json.encode(self._content(output, *self._read(output)))

    def _read(self, output: RequestOutput) -> tuple[Sequence[Event], str | None]:
        self._counted.see(0, output)
        choice: CompletionOutput = output.outputs[0]
        finish_reason = check_finish(output, choice)
        events = self._parts.push(choice.text, ended=finish_reason is not None)
        return events, self._parts.finish_reason(finish_reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation as the engine takes it, whichever door it came through."""

    messages: Sequence[Mapping[str, Any]]
    """As chat templates take them."""
    tools: Sequence[Mapping[str, Any]] = ()
    """As chat templates show them."""
    asked: Asked
    params: SamplingParams
    template_arguments: Mapping[str, Any]
    continues: bool = False
    """The last message is the assistant's, and is gone on with."""

    async def encode(self, context: ServerContext, caller: Caller) -> list[int]:
        """Its token ids under the model's template."""
        return await context.engine.encode_chat(
            self.messages,
            add_generation_prompt=not self.continues,
            continue_final_message=self.continues,
            tools=self.tools or None,
            chat_template_kwargs=self.template_arguments,
            caller=caller,
        )

    async def prompt(self, context: ServerContext, caller: Caller) -> Prompt:
        """What its answer goes on from, held to what is asked."""
        token_ids, names = await self.encode(context, caller), [tool["function"]["name"] for tool in self.tools]
        held = await context.engine.hold(self.params, self.asked, token_ids, names=names, caller=caller)
        parser = None if held.make_parser is None else held.make_parser()
        return Prompt(token_ids=token_ids, params=held.params, parser=parser)


def tool_named(tools: Sequence[Tool], name: str, place: str) -> Tool:
    """The tool that a choice names.

    Raises:
        InvalidRequestError: there is none.
    """
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        known = ", ".join(tool.name for tool in tools)[:200] or "there are none"
        text = f"{place} is {name!r}, which is no tool of this request ({known})"
        raise InvalidRequestError(text, param="tool_choice")
    return found
