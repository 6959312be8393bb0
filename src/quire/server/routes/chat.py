"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.outputs import CompletionOutput, RequestOutput
from quire.server.context import RequestContext, ServerContext, new_id
from quire.server.delivery import deliver, naming_param
from quire.server.protocol import responses
from quire.server.protocol.chat import ChatCall, Conversation, parse_chat
from quire.server.protocol.truncation import truncate_prompt
from quire.server.protocol.usage import Usage
from quire.server.streams import Outputs, coalesce, last_outputs, merged


async def create_chat_completion(request: Request) -> Response:
    """Go on with a conversation."""
    context: ServerContext = request.app.state.context
    defaults = context.engine.get_default_sampling_params()
    call = await context.bodies.read(request, lambda body: parse_chat(body, defaults, context.limits))
    answer = _Answer(context, call, context.request_context(request, call.options.cache_salt, call.options.timeout_s))
    with naming_param("prompt", "messages"):
        return await deliver(request, answer, stream=call.options.stream)


async def encode_conversation(context: ServerContext, conversation: Conversation) -> list[int]:
    """Token ids of a conversation under the model's template."""
    return await context.engine.encode_chat(
        conversation.messages,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        chat_template=conversation.template,
        documents=conversation.documents or None,
        add_special_tokens=conversation.add_special_tokens,
        chat_template_kwargs=conversation.template_arguments,
    )


class _Answer:
    """One answer under way."""

    def __init__(self, context: ServerContext, call: ChatCall, request: RequestContext) -> None:
        self._context, self._call, self._request = context, call, request
        self._id = new_id("chatcmpl", call.options.request_id)
        self._head: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk" if call.options.stream else "chat.completion",
            "created": int(time.time()),
            "model": context.resolve_name(call.options.model),
            "system_fingerprint": responses.FINGERPRINT,
        }
        self._usage = Usage(1, shows_cached=context.show_cached_tokens)

    def headers(self) -> dict[str, str]:
        """Its id and where its time went."""
        return {"x-request-id": self._id, "server-timing": self._usage.server_timing()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        with self._inside():
            (output,) = await last_outputs([await self._start()])
        self._usage.see(0, output)
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": self._call.echoed + choice.text, "refusal": None},
                "logprobs": self._logprobs(choice),
                "finish_reason": responses.check_finish(output, choice),
                "stop_reason": choice.stop_reason,
                **self._token_ids(choice),
            }
            for choice in output.outputs
        ]
        content = {**self._head, "choices": choices, "usage": self._usage.counts(), "timings": self._usage.timings()}
        if self._call.wants_prompt_logprobs:
            content["prompt_logprobs"] = responses.prompt_logprobs(output.prompt_logprobs)
        return {**content, **await self._of_prompt(output)}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces: for each choice its role, what it says, why it ended; then usage."""
        options, usage = self._call.options, self._usage
        begun: set[int] = set()
        with self._inside():
            async with aclosing(merged([coalesce(await self._start(), options.stream_interval)])) as outputs:
                async for _, output in outputs:
                    usage.see(0, output)
                    pieces = [piece for choice in output.outputs for piece in self._pieces(output, choice, begun)]
                    for piece in pieces:
                        event = {**self._head, "choices": [piece]}
                        if options.continuous_usage:
                            event["usage"] = usage.counts()
                        elif options.include_usage:
                            event["usage"] = None
                        if "role" in piece["delta"]:
                            event |= await self._of_prompt(output)
                        if usage.finished and piece is pieces[-1] and not options.include_usage:
                            event["timings"] = usage.timings()
                        yield event
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": usage.counts(), "timings": usage.timings()}

    def _pieces(self, output: RequestOutput, choice: CompletionOutput, begun: set[int]) -> list[dict[str, Any]]:
        finish_reason = responses.check_finish(output, choice)
        pieces = []
        if choice.index not in begun:
            begun.add(choice.index)
            pieces.append(_piece(choice.index, {"role": "assistant", "content": self._call.echoed, "refusal": None}))
        ids = self._token_ids(choice)
        if choice.text or (choice.token_ids and (choice.logprobs or ids)):
            pieces.append({**_piece(choice.index, {"content": choice.text}, self._logprobs(choice)), **ids})
        if finish_reason is not None:
            end = _piece(choice.index, {})
            pieces.append({**end, "finish_reason": finish_reason, "stop_reason": choice.stop_reason})
        return pieces

    async def _start(self) -> Outputs:
        engine, call = self._context.engine, self._call
        token_ids = await encode_conversation(self._context, call.conversation)
        return engine.generate(
            {"prompt_token_ids": truncate_prompt(token_ids, call.options, engine.max_model_len)},
            call.params,
            request_id=self._id,
            priority=call.options.priority,
            cache_salt=self._request.cache_salt,
            caller=self._request.caller,
            timeout_s=self._request.timeout_s,
        )

    def _inside(self) -> AbstractContextManager[None]:
        return self._context.gate.inside(f"{self._request.caller.name}/{self._id}")

    async def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """What was asked for of the prompt as the model read it."""
        found: dict[str, Any] = {}
        if self._call.options.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        if self._call.wants_prompt_text:
            decode = self._context.engine.get_tokenizer().decode
            found["prompt_text"] = await asyncio.to_thread(decode, output.prompt_token_ids, skip_special_tokens=False)
        return found

    def _token_ids(self, choice: CompletionOutput) -> dict[str, Any]:
        return {"token_ids": choice.token_ids} if self._call.options.return_token_ids else {}

    def _logprobs(self, choice: CompletionOutput) -> dict[str, Any] | None:
        top = self._call.top_logprobs
        if top is None:
            return None
        bytes_of = self._context.engine.get_tokenizer().token_bytes
        names = responses.TokenNames(bytes_of, as_ids=self._call.options.tokens_as_token_ids)
        return responses.chat_logprobs(choice, top, self._call.params.logprob_token_ids or (), names)


def _piece(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


ROUTES = [
    Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
]
