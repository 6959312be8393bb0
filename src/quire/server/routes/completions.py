"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.server.context import RequestContext, ServerContext, new_id
from quire.server.delivery import deliver, naming_param
from quire.server.protocol import responses
from quire.server.protocol.completions import CompletionCall, parse_completion
from quire.server.protocol.truncation import truncate_prompt
from quire.server.protocol.usage import Usage
from quire.server.streams import Outputs, coalesce, last_outputs, merged


async def create_completion(request: Request) -> Response:
    """Continue each prompt."""
    context: ServerContext = request.app.state.context
    defaults = context.engine.get_default_sampling_params()
    call = await context.bodies.read(request, lambda body: parse_completion(body, defaults, context.limits))
    answer = _Answer(context, call, context.request_context(request, call.options.cache_salt, call.options.timeout_s))
    with naming_param("prompt_token_ids", "prompt"):
        return await deliver(request, answer, stream=call.options.stream)


class _Answer:
    """One answer under way."""

    def __init__(self, context: ServerContext, call: CompletionCall, request: RequestContext) -> None:
        self._context, self._call, self._request = context, call, request
        self._id = new_id("cmpl", call.options.request_id)
        self._head: dict[str, Any] = {
            "id": self._id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.resolve_name(call.options.model),
            "system_fingerprint": responses.FINGERPRINT,
        }
        self._texts: list[str | None] = []
        """Of each prompt, where it is known as it was sent."""
        self._offsets: dict[int, int] = {}
        shows_cached = context.show_cached_tokens
        self._usage = Usage(len(call.prompts), shows_cached=shows_cached, prompt_only=call.prompt_only)

    def headers(self) -> dict[str, str]:
        """Its id and where its time went."""
        return {"x-request-id": self._id, "server-timing": self._usage.server_timing()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        with self._inside():
            outputs = await last_outputs(await self._start())
        choices = []
        for number, output in enumerate(outputs):
            self._usage.see(number, output)
            choices += [self._choice(number, output, choice) for choice in output.outputs]
        return {**self._head, "choices": choices, "usage": self._usage.counts(), "timings": self._usage.timings()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces."""
        options, usage = self._call.options, self._usage
        with self._inside():
            async with aclosing(
                merged([coalesce(item, options.stream_interval) for item in await self._start()])
            ) as outputs:
                async for number, output in outputs:
                    usage.see(number, output)
                    for choice in output.outputs:
                        event = {**self._head, "choices": [self._choice(number, output, choice)]}
                        if options.continuous_usage:
                            event["usage"] = usage.counts()
                        elif options.include_usage:
                            event["usage"] = None
                        if usage.finished and choice is output.outputs[-1] and not options.include_usage:
                            event["timings"] = usage.timings()
                        yield event
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": usage.counts(), "timings": usage.timings()}

    def _inside(self) -> AbstractContextManager[None]:
        return self._context.gate.inside(f"{self._request.caller.name}/{self._id}")

    async def _start(self) -> list[Outputs]:
        """Every prompt is checked before the first one starts."""
        engine, call = self._context.engine, self._call
        prompts: list[Sequence[int]] = []
        for prompt in call.prompts:
            text = prompt if isinstance(prompt, str) else None
            token_ids: Sequence[int] = prompt if isinstance(prompt, list) else []
            if text is not None:
                token_ids = await engine.encode(text, add_special_tokens=call.add_special_tokens)
            prompts.append(truncate_prompt(token_ids, call.options, engine.max_model_len))
            self._texts.append(text if len(prompts[-1]) == len(token_ids) else None)
        return [
            engine.generate(
                {"prompt_token_ids": token_ids},
                call.params,
                request_id=f"{self._id}/{number}",
                priority=call.options.priority,
                cache_salt=self._request.cache_salt,
                caller=self._request.caller,
                timeout_s=self._request.timeout_s,
            )
            for number, token_ids in enumerate(prompts)
        ]

    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        """What is new of one sequence; its first part has what belongs to the prompt too."""
        call, index = self._call, number * self._call.params.n + choice.index
        is_first = index not in self._offsets
        echoes = call.echo and is_first
        offset = self._offsets.setdefault(index, 0)
        logprobs = None
        if call.logprobs is not None:
            logprobs = self._logprobs(output, choice, call.logprobs, offset, echoes=echoes)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        content: dict[str, Any] = {
            "index": index,
            "text": (self._prompt_text(number, output) if echoes else "") + ("" if call.prompt_only else choice.text),
            "logprobs": logprobs,
            "finish_reason": responses.check_finish(output, choice),
            "stop_reason": choice.stop_reason,
        }
        if call.options.return_token_ids:
            content["token_ids"] = [] if call.prompt_only else choice.token_ids
            content["prompt_token_ids"] = output.prompt_token_ids if is_first else None
        if call.wants_prompt_logprobs:
            content["prompt_logprobs"] = responses.prompt_logprobs(output.prompt_logprobs)
        return content

    def _logprobs(
        self, output: RequestOutput, choice: CompletionOutput, top: int, offset: int, *, echoes: bool
    ) -> dict[str, Any]:
        spans: list[tuple[int, PositionLogprobs | None]] = []
        if echoes:
            spans += zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
        if not self._call.prompt_only:
            spans += zip(choice.token_ids, choice.logprobs or [], strict=True)
        bytes_of = self._context.engine.get_tokenizer().token_bytes
        names = responses.TokenNames(bytes_of, as_ids=self._call.options.tokens_as_token_ids)
        return responses.completion_logprobs(spans, top, self._call.params.logprob_token_ids or (), offset, names)

    def _prompt_text(self, number: int, output: RequestOutput) -> str:
        text = self._texts[number]
        if text is None:
            text = self._context.engine.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
        return text


ROUTES = [
    Route("/v1/completions", create_completion, methods=["POST"]),
]
