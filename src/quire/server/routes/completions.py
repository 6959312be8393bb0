"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.server.body import read_object
from quire.server.context import ServerContext, new_id
from quire.server.delivery import deliver, naming_param
from quire.server.protocol import answers
from quire.server.protocol.completions import CompletionCall, Prompt, parse_completion
from quire.server.streams import Outputs, final_outputs, merged

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Continue each prompt."""
    context: ServerContext = request.app.state.context
    body = await read_object(request)
    call = parse_completion(body, context.engine.get_default_sampling_params())
    answer = _Answer(context, call, context.cache_salt(request, call.delivery.cache_salt))
    with naming_param("prompt_token_ids", "prompt"):
        return await deliver(request, answer, stream=call.delivery.stream)


class _Answer:
    """One answer under way."""

    def __init__(self, context: ServerContext, call: CompletionCall, cache_salt: str) -> None:
        self._context, self._call, self._cache_salt = context, call, cache_salt
        self.id = new_id("cmpl")
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.resolve_name(call.delivery.model),
            "system_fingerprint": answers.FINGERPRINT,
        }
        self._offsets: dict[int, int] = {}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        with self._context.gate.inside():
            outputs = await final_outputs(await self._start())
        n = self._call.params.n
        choices = [
            self._choice(number * n + choice.index, number, output, choice, is_first=True)
            for number, output in enumerate(outputs)
            for choice in output.outputs
        ]
        counted = answers.usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            0 if self._call.prompt_only else sum(len(c.token_ids) for o in outputs for c in o.outputs),
            sum(output.num_cached_tokens for output in outputs) if self._context.show_cached_tokens else None,
        )
        return {**self._head, "choices": choices, "usage": counted}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces."""
        call, n = self._call, self._call.params.n
        head = {**self._head, "usage": None} if call.delivery.include_usage else self._head
        prompt_tokens: dict[int, int] = {}
        cached_tokens: dict[int, int] = {}
        num_tokens = 0
        with self._context.gate.inside():
            async with aclosing(merged(await self._start())) as outputs:
                async for number, output in outputs:
                    prompt_tokens[number] = len(output.prompt_token_ids)
                    cached_tokens[number] = max(output.num_cached_tokens, cached_tokens.get(number, 0))
                    for choice in output.outputs:
                        index = number * n + choice.index
                        num_tokens += len(choice.token_ids)
                        is_first = index not in self._offsets
                        yield {**head, "choices": [self._choice(index, number, output, choice, is_first=is_first)]}
        if call.delivery.include_usage:
            cached = sum(cached_tokens.values()) if self._context.show_cached_tokens else None
            counted = answers.usage(sum(prompt_tokens.values()), 0 if call.prompt_only else num_tokens, cached)
            yield {**self._head, "choices": [], "usage": counted}

    async def _start(self) -> list[Outputs]:
        context, call = self._context, self._call
        streams = []
        for number, prompt in enumerate(call.prompts):
            ready: Prompt = prompt
            if isinstance(prompt, str) and not call.add_special_tokens:
                ready = await context.engine.encode(prompt, add_special_tokens=False)
            streams.append(
                context.engine.generate(
                    ready,
                    call.params,
                    request_id=f"{self.id}-{number}",
                    priority=call.delivery.priority,
                    cache_salt=self._cache_salt,
                )
            )
        return streams

    def _choice(
        self, index: int, number: int, output: RequestOutput, choice: CompletionOutput, *, is_first: bool
    ) -> dict[str, Any]:
        call = self._call
        finish_reason = answers.check_finish(output, choice)
        echoed = self._prompt_text(number, output) if call.echo and is_first else ""
        offset = self._offsets.setdefault(index, 0)
        logprobs = None
        if call.logprobs is not None:
            spans: list[tuple[int, PositionLogprobs | None]] = []
            if call.echo and is_first:
                spans += zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
            if not call.prompt_only:
                spans += zip(choice.token_ids, choice.logprobs or [], strict=True)
            text_of = self._context.engine.get_tokenizer().token_text
            logprobs = answers.completion_logprobs(spans, call.logprobs, offset, text_of)
            offset += sum(map(len, logprobs["tokens"]))
        self._offsets[index] = offset
        content: dict[str, Any] = {
            "index": index,
            "text": echoed + ("" if call.prompt_only else choice.text),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if call.wants_prompt_logprobs:
            content["prompt_logprobs"] = answers.prompt_logprobs(output.prompt_logprobs)
        return content

    def _prompt_text(self, number: int, output: RequestOutput) -> str:
        prompt = self._call.prompts[number]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._context.engine.get_tokenizer()
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
