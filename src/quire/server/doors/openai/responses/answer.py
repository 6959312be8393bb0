"""A response under way: a chat whose answer is written as items and events, and kept at its end."""

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from quire.engine.tools import AnswerParser, Content, joined
from quire.errors import PromptTooLongError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.doors.openai import choice_parts
from quire.server.doors.openai.parse import ChatCall
from quire.server.doors.openai.respond import ChatAnswer
from quire.server.doors.openai.responses.bodies import ResponseBody
from quire.server.doors.openai.responses.items import Item
from quire.server.doors.openai.responses.keep import Keeper
from quire.server.doors.openai.responses.parse import chat_of, in_our_words
from quire.server.doors.openai.responses.writer import ResponseEvent, Writer
from quire.server.doors.openai.shapes import naming_shape
from quire.server.http.context import RequestContext, ServerContext
from quire.server.http.errors import ApiError, as_api_error
from quire.server.http.streams import merged

logger = logging.getLogger("quire.server")
_STATUS = {"length": "incomplete"}
LAST = ("response.completed", "response.incomplete", "response.failed")


class ResponseAnswer(ChatAnswer):
    """Of /v1/responses.

    Args:
        body: what was asked.
        before: items of earlier turns.
        items: those of this input.
        keeper: keeps it; None: nothing is kept.
    """

    prefix, kind, event_kind = "resp", "response", "response"

    def __init__(
        self,
        context: ServerContext,
        call: ChatCall,
        request: RequestContext,
        *,
        body: ResponseBody,
        before: Sequence[Item],
        items: Sequence[Item],
        keeper: Keeper | None,
    ) -> None:
        super().__init__(context, call, request)
        self._id = self._id.replace("-", "_", 1)
        self._body, self._before, self._items, self._keeper = body, before, items, keeper
        self._writer = Writer(self._response_head(), shows_reasoning=call.shows_reasoning)
        self._parser: AnswerParser | None = None

    @property
    def id(self) -> str:
        """Of the response."""
        return self._id

    @property
    def items(self) -> Sequence[Item]:
        """Of the input."""
        return self._items

    def queued(self) -> dict[str, Any]:
        """The response before anything is computed."""
        return self._writer.response("queued")

    async def num_input_tokens(self) -> int:
        """How many tokens the model would read."""
        with self._context.gate.inside(self._name):
            ((_, token_ids),) = await self._prompts()
        return len(token_ids)

    async def whole(self) -> bytes:
        """The answer in one piece, as JSON."""
        async with aclosing(self.events()) as events:
            async for event in events:
                last = event
        if last["type"] == "response.failed":
            raise ApiError(500, last["response"]["error"]["message"], code="request_failed")
        return msgspec.json.encode(last["response"])

    async def events(self) -> AsyncGenerator[ResponseEvent, None]:
        """The answer in pieces. What goes wrong after the first of them is one of them."""
        writer, has_begun = self._writer, False
        with self._context.gate.inside(self._name), in_our_words(), naming_shape(self._call.shape_place):
            try:
                async with aclosing(merged(await self._start())) as outputs:
                    async for _, output in outputs:
                        self._usage.see(0, output)
                        size = self._size(output, 0 if has_begun else len(output.prompt_token_ids))
                        if output.finished:  # then it counts the tokens of all that was thought
                            size += sum(map(len, writer.reasoning))
                        make = partial(self._events_of, output, begins=not has_begun)
                        made = await self._engine.beside(make, size, self._request.caller, first=True)
                        has_begun = True
                        for event in made:
                            yield await self._kept(event)
            except Exception as error:
                if not has_begun:
                    raise
                refusal = as_api_error(error)
                failure = {"code": "server_error", "message": refusal.message}
                for event in writer.end("failed", None, error=failure):
                    yield await self._kept(event)

    def _events_of(self, output: RequestOutput, *, begins: bool) -> list[ResponseEvent]:
        (choice,) = output.outputs
        found = [*self._writer.begin()] if begins else []
        reason = choice_parts.check_finish(output, choice)
        found += self._writer.push(self._said(choice), self._token_logprobs(choice))
        if reason is not None:
            status = _STATUS.get(reason, "completed")
            details = None if status == "completed" else {"reason": "max_output_tokens"}
            more = {"incomplete_details": details, "completed_at": int(time.time()) if details is None else None}
            found += self._writer.end(status, self._counts(), **more)
        return found

    def _said(self, choice: CompletionOutput) -> Sequence[Any]:
        if self._make_parser is None:
            return [Content(choice.text)] if choice.text else []
        if self._parser is None:
            self._parser = self._make_parser()
        found = self._parser.push(choice.text)
        if choice.finish_reason is not None:
            found += self._parser.end()
        return joined(found)

    def _token_logprobs(self, choice: CompletionOutput) -> list[Any] | None:
        found = self._logprobs(choice)
        return None if found is None else found["content"]

    def _counts(self) -> dict[str, Any]:
        counts = self._usage.counts()
        text, encode = "".join(self._writer.reasoning), self._engine.get_tokenizer().encode
        thought = encode(text, add_special_tokens=False) if text else ()
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": min(len(thought), counts["completion_tokens"])},
            "total_tokens": counts["total_tokens"],
        }

    async def _kept(self, event: ResponseEvent) -> ResponseEvent:
        """An event on its way; the last one says whether the response was kept."""
        if self._keeper is None or event["type"] not in LAST:
            return event
        try:
            await self._keeper.finish(event["response"], self._items)
        except ApiError as error:
            logger.warning("a response could not be kept: %s", error.message)
            event["response"]["store"] = False
        return event

    async def _prompts(self) -> list[tuple[str, Sequence[int]]]:
        with in_our_words():
            if self._body.truncation != "auto":
                return await super()._prompts()
            return await self._truncated()

    async def _truncated(self) -> list[tuple[str, Sequence[int]]]:
        """With as many of the newest items as fit, found by halving; the last one always stays."""
        items = [*self._before, *self._items]
        least, most, first, found = 0, len(items) - 1, 0, None
        while least < most:
            fitting = await self._fitting(items[first:])
            found, least, most = (found, first + 1, most) if fitting is None else (fitting, least, first)
            first = (least + most) // 2
        if found is None:
            await self._ask(items[most:])
            found = await super()._prompts()
        return found

    async def _fitting(self, items: Sequence[Item]) -> list[tuple[str, Sequence[int]]] | None:
        """The prompt of these items; None: it is too long."""
        while len(items) > 1 and items[0]["type"] == "function_call_output":  # the call that it answers is gone
            items = items[1:]
        await self._ask(items)
        try:
            found = await super()._prompts()
        except PromptTooLongError:
            return None
        return found if len(found[0][1]) < self._engine.max_model_len else None

    async def _ask(self, items: Sequence[Item]) -> None:
        """Go on with these items alone."""
        make = partial(chat_of, self._body, items, self._engine.get_default_sampling_params(), self._context.limits)
        self._call = await self._engine.beside(make, sum(len(str(item)) for item in items), self._request.caller)

    def _response_head(self) -> dict[str, Any]:
        """What the answer says of the request."""
        body, params = self._body, self._call.params
        text: dict[str, Any] = {"format": (body.text and body.text.format) or {"type": "text"}}
        if body.text is not None and body.text.verbosity is not None:
            text["verbosity"] = body.text.verbosity
        reasoning = {"effort": body.reasoning and body.reasoning.effort, "summary": None}
        options = body.options
        conversation = None if self._keeper is None else self._keeper.conversation
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": body.background,
            "completed_at": None,
            "conversation": None if conversation is None else {"id": conversation},
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": params.max_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._context.resolve_name(options.model),
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": options.prompt_cache_key,
            "reasoning": reasoning,
            "safety_identifier": options.safety_identifier,
            "service_tier": "default",
            "store": self._keeper is not None and self._keeper.keeps_response,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": msgspec.to_builtins(body.tool_choice),
            "tools": [{**tool, "strict": bool(tool["strict"])} for tool in msgspec.to_builtins(body.tools)],
            "top_logprobs": self._call.top_logprobs,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": options.user,
        }
