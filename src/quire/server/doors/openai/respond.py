"""Answers under way: what completions and chats have in common, and the choices of each."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from quire.engine.queue import Caller
from quire.engine.tools import AnswerParser
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.answers.finish import mean_logprob
from quire.server.doors.openai import choice_parts
from quire.server.doors.openai.answer_parts import AnswerParts
from quire.server.doors.openai.beams import Start, search_beams
from quire.server.doors.openai.conversation import Conversation, Message, MessageCall
from quire.server.doors.openai.parse import (
    Call,
    ChatCall,
    CompletionCall,
    bound_logprobs,
    text_of,
    truncate_prompt,
)
from quire.server.doors.openai.shapes import deprecation_headers, naming_shape
from quire.server.doors.openai.tools import tools_of
from quire.server.doors.openai.usage import Usage
from quire.server.http.context import RequestContext, ServerContext, new_id
from quire.server.http.streams import Outputs, coalesce, last_outputs, merged

C = TypeVar("C", bound=Call)
Content = dict[str, Any]
NAMED_PER_CHARACTER = 4
"""Tokens whose log-probabilities are written in the time in which one character is tokenised."""


class Answer(ABC, Generic[C]):
    """One answer: its prompts run together, and leave in one piece or as events."""

    prefix: ClassVar[str]
    """Of its id."""
    kind: ClassVar[str]
    """What it calls itself, whole."""
    event_kind: ClassVar[str]
    field: ClassVar[str]
    """Of the body: what the prompt is made of."""

    def __init__(self, context: ServerContext, call: C, request: RequestContext) -> None:
        self._context, self._engine, self._call, self._request = context, context.engine, call, request
        self._id = new_id(self.prefix, call.options.request_id)
        self._head: Content = {
            "id": self._id,
            "object": self.event_kind if call.options.stream else self.kind,
            "created": int(time.time()),
            "model": context.resolve_name(call.options.model),
            "system_fingerprint": choice_parts.FINGERPRINT,
            **choice_parts.of_labels(call.options),
        }
        self._usage = Usage(call.num_prompts, shows_cached=context.show_cached_tokens, prompt_only=call.prompt_only)

    def headers(self) -> dict[str, str]:
        """Its id, where its time went, and which of its fields have newer names."""
        timing = self._usage.server_timing()
        return {"x-request-id": self._id, "server-timing": timing, **deprecation_headers(self._call.deprecated)}

    async def whole(self) -> bytes:
        """The answer in one piece, as JSON."""
        with self._context.gate.inside(self._name), naming_shape(self._call.shape_place):
            outputs = await last_outputs(await self._start())
            size = sum(self._size(output, len(output.prompt_token_ids)) for output in outputs)
            return await self._engine.beside(partial(self._written, outputs), size, self._request.caller, first=True)

    def _written(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        for number, output in enumerate(outputs):
            self._usage.see(number, output)
            for choice in self._shown(output):
                choices.append(msgspec.Raw(msgspec.json.encode(self._choice(number, output, choice))))
                choice.logprobs = None  # many objects: freed one sequence after another, and not all at the end
        content = {**self._head, "choices": choices, "usage": self._usage.counts(), "timings": self._usage.timings()}
        return msgspec.json.encode({**content, **self._of_prompt(outputs[0])})

    def _shown(self, output: RequestOutput) -> Sequence[CompletionOutput]:
        """The sequences that are given, in their order."""
        return output.outputs

    async def events(self) -> AsyncGenerator[Content, None]:
        """The answer in pieces; then usage."""
        options, usage, begun = self._call.options, self._usage, set[int]()
        with self._context.gate.inside(self._name), naming_shape(self._call.shape_place):
            streams = [coalesce(stream, options.stream_interval) for stream in await self._start()]
            async with aclosing(merged(streams)) as outputs:
                async for number, output in outputs:
                    usage.see(number, output)
                    size = self._size(output, 0 if number in begun else len(output.prompt_token_ids))
                    begun.add(number)
                    make = partial(self._made, number, output)
                    pieces, of_prompt = await self._engine.beside(make, size, self._request.caller, first=True)
                    for piece in pieces:
                        event = {**self._head, "choices": [piece]}
                        if "role" in piece.get("delta", ()):
                            event |= of_prompt
                        if options.continuous_usage:
                            event["usage"] = usage.counts()
                        elif options.include_usage:
                            event["usage"] = None
                        if usage.finished and piece is pieces[-1] and not options.include_usage:
                            event["timings"] = usage.timings()
                        yield event
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": usage.counts(), "timings": usage.timings()}

    @property
    def _name(self) -> str:
        return f"{self._request.caller.name}/{self._id}"

    @abstractmethod
    async def _prompts(self) -> list[tuple[str, Sequence[int]]]:
        """The engine's name for each prompt, and its token ids."""

    @abstractmethod
    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> Content:
        """One sequence of the answer, whole."""

    @abstractmethod
    def _pieces(self, number: int, output: RequestOutput, choice: CompletionOutput) -> list[Content]:
        """What is new of one sequence, as the choices of one event each."""

    def _made(self, number: int, output: RequestOutput) -> tuple[list[Content], Content]:
        """What is new of all sequences of a prompt; and `_of_prompt` with the beginning of one."""
        pieces = [piece for choice in output.outputs for piece in self._pieces(number, output, choice)]
        begins = any("role" in piece.get("delta", ()) for piece in pieces)
        return pieces, self._of_prompt(output) if begins else {}

    def _size(self, output: RequestOutput, num_prompt_tokens: int) -> int:
        """How much it takes to write this, as characters that are tokenised."""
        num_tokens = sum(len(choice.token_ids) for choice in output.outputs)
        named = num_tokens * self._call.named_of_answer + num_prompt_tokens * self._call.named_of_prompt
        return num_prompt_tokens + num_tokens + named // NAMED_PER_CHARACTER

    def _of_prompt(self, output: RequestOutput) -> Content:
        """What stands beside the choices: of the prompt as the model read it."""
        return {}

    async def _start(self) -> list[Outputs]:
        """Every prompt is checked before the first one starts."""
        engine, caller = self._engine, self._request.caller
        bad_words = await engine.encode_bad_words(self._call.params, caller=caller)
        prompts = await self._prompts()
        lengths, most = [len(token_ids) for _, token_ids in prompts], self._context.limits.prompt_tokens
        if max(lengths) > most.value:
            raise most.error(f"{max(lengths):,}", self.field)
        params = bound_logprobs(self._call, lengths, engine.max_model_len, self._context.limits)
        params = await self._held(params, prompts[0][1])

        def start(ids: Sequence[int], params: SamplingParams, request_id: str, timeout_s: float | None) -> Outputs:
            return engine.generate(
                {"prompt_token_ids": ids},
                params,
                request_id=request_id,
                priority=self._call.options.priority,
                cache_salt=self._request.cache_salt,
                caller=caller,
                timeout_s=timeout_s,
                bad_words=bad_words,
                is_background=self._request.is_background,
            )

        timeout_s = self._request.timeout_s
        return [self._started(start, token_ids, params, request_id, timeout_s) for request_id, token_ids in prompts]

    def _started(
        self, start: Start, token_ids: Sequence[int], params: SamplingParams, request_id: str, timeout_s: float | None
    ) -> Outputs:
        """The outputs of one prompt."""
        return start(token_ids, params, request_id, timeout_s)

    async def _held(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> SamplingParams:
        """The parameters that hold the answers to what is asked of their parts."""
        return params

    def _token_names(self) -> choice_parts.TokenNames:
        as_ids = self._call.options.return_tokens_as_token_ids
        return choice_parts.TokenNames(self._engine.get_tokenizer().token_bytes, as_ids=as_ids)


class CompletionAnswer(Answer[CompletionCall]):
    """Of /v1/completions: the sequences of all prompts, numbered through."""

    prefix, kind, event_kind, field = "cmpl", "text_completion", "text_completion", "prompt"

    def __init__(self, context: ServerContext, call: CompletionCall, request: RequestContext) -> None:
        super().__init__(context, call, request)
        self._texts: list[str | None] = []
        """Of each prompt, where it is known as it was sent."""
        self._begun: set[int] = set()
        """Sequences of which something was sent."""
        self._offsets: dict[int, Any] = {}
        """Of each: the tokenizer's `text_offsets`."""
        self._prompt_logprobs: dict[int, msgspec.Raw] = {}

    async def _prompts(self) -> list[tuple[str, Sequence[int]]]:
        found = []
        for number, prompt in enumerate(self._call.prompts):
            text = prompt if isinstance(prompt, str) else None
            token_ids: Sequence[int] = prompt if isinstance(prompt, list) else []
            if text is not None:
                add_special_tokens, caller = self._call.add_special_tokens, self._request.caller
                token_ids = await self._engine.encode(
                    text, add_special_tokens=add_special_tokens, suffix=self._call.suffix, caller=caller
                )
                await asyncio.sleep(0)  # a short text does not wait for a thread: so many must not stop the loop
            kept = truncate_prompt(token_ids, self._call, self._engine.max_model_len)
            self._texts.append(text if len(kept) == len(token_ids) else None)
            found.append((f"{self._id}/{number}", kept))
        return found

    def _started(
        self, start: Start, token_ids: Sequence[int], params: SamplingParams, request_id: str, timeout_s: float | None
    ) -> Outputs:
        if self._call.beams is None:
            return super()._started(start, token_ids, params, request_id, timeout_s)
        return search_beams(self._engine, self._call.beams, token_ids, request_id, timeout_s, start)

    def _shown(self, output: RequestOutput) -> Sequence[CompletionOutput]:
        if self._call.num_shown == self._call.params.n:
            return output.outputs
        ranked = sorted(output.outputs, key=mean_logprob, reverse=True)
        return [replace(choice, index=place) for place, choice in enumerate(ranked[: self._call.num_shown])]

    def _pieces(self, number: int, output: RequestOutput, choice: CompletionOutput) -> list[Content]:
        return [self._choice(number, output, choice)]

    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> Content:
        """What is new of one sequence; its first part has what belongs to the prompt too."""
        call, index = self._call, number * self._call.num_shown + choice.index
        finish_reason = choice_parts.check_finish(output, choice)
        is_first = index not in self._begun
        self._begun.add(index)
        prompt = self._prompt_text(number, output) if call.echo and is_first else None
        content: Content = {
            "index": index,
            "text": (prompt or "") + ("" if call.prompt_only else choice.text),
            "logprobs": None if call.logprobs is None else self._logprobs(index, output, choice, prompt),
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if call.options.return_token_ids:
            content["token_ids"] = [] if call.prompt_only else choice.token_ids
            content["prompt_token_ids"] = output.prompt_token_ids if is_first else None
        if call.wants_prompt_logprobs:
            if number not in self._prompt_logprobs:
                self._prompt_logprobs[number] = choice_parts.prompt_logprobs(output.prompt_logprobs)
            content["prompt_logprobs"] = self._prompt_logprobs[number]
        return content

    def _logprobs(self, index: int, output: RequestOutput, choice: CompletionOutput, prompt: str | None) -> Content:
        """Of what is new of one sequence, and of its prompt, where that is given."""
        call, params, tokenizer = self._call, self._call.params, self._engine.get_tokenizer()
        spans: list[tuple[int, PositionLogprobs | None]] = []
        offsets: list[int] = []
        if prompt is not None:
            spans += zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
            offsets += tokenizer.prompt_offsets(prompt, output.prompt_token_ids)
        if index not in self._offsets:
            self._offsets[index] = tokenizer.text_offsets(
                len(prompt or ""),
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                prompt_token_ids=output.prompt_token_ids,
            )
        if not call.prompt_only:
            spans += zip(choice.token_ids, choice.logprobs or [], strict=True)
            offsets += self._offsets[index].push(choice.token_ids)
        asked = params.logprob_token_ids or ()
        return choice_parts.completion_logprobs(spans, call.logprobs or 0, asked, offsets, self._token_names())

    def _prompt_text(self, number: int, output: RequestOutput) -> str:
        text = self._texts[number]
        if text is None:
            text = self._engine.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
        return text


class ChatAnswer(Answer[ChatCall]):
    """Of /v1/chat/completions: as events, for each choice its role, what it says, why it ended."""

    prefix, kind, event_kind, field = "chatcmpl", "chat.completion", "chat.completion.chunk", "messages"

    def __init__(self, context: ServerContext, call: ChatCall, request: RequestContext) -> None:
        super().__init__(context, call, request)
        self._begun: set[int] = set()
        self._make_parser: Callable[[], AnswerParser] | None = None
        self._parts: dict[int, AnswerParts] = {}
        """By sequence, where an answer may hold more than content."""

    async def _prompts(self) -> list[tuple[str, Sequence[int]]]:
        token_ids = await encode_conversation(self._context, self._call.conversation, self._request.caller)
        return [(self._id, truncate_prompt(token_ids, self._call, self._engine.max_model_len))]

    async def _held(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> SamplingParams:
        call, names = self._call, [tool.function.name for tool in self._call.conversation.tools]
        held = await self._engine.hold(params, call.asked, prompt_token_ids, names=names, caller=self._request.caller)
        self._make_parser = held.make_parser
        return held.params

    def _parts_of(self, choice: CompletionOutput) -> AnswerParts | None:
        if self._make_parser is not None and choice.index not in self._parts:
            parts = AnswerParts(self._make_parser(), shows_reasoning=self._call.shows_reasoning)
            self._parts[choice.index] = parts
        return self._parts.get(choice.index)

    def _choice(self, number: int, output: RequestOutput, choice: CompletionOutput) -> Content:
        finish_reason, parts = choice_parts.check_finish(output, choice), self._parts_of(choice)
        if parts is None:
            message: Content = {"role": "assistant", "content": self._call.echoed + choice.text, "refusal": None}
        else:
            message = parts.message(choice.text, self._call.echoed)
            finish_reason = parts.finish_reason(finish_reason)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
            **self._token_ids(choice),
        }

    def _pieces(self, number: int, output: RequestOutput, choice: CompletionOutput) -> list[Content]:
        finish_reason, parts = choice_parts.check_finish(output, choice), self._parts_of(choice)
        pieces = []
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            pieces.append(_piece(choice.index, {"role": "assistant", "content": self._call.echoed, "refusal": None}))
        ids = self._token_ids(choice)
        has_more = bool(choice.token_ids and (choice.logprobs or ids))
        if parts is None:
            deltas: list[Content] = [{"content": choice.text}] if choice.text or has_more else []
        else:
            deltas = parts.deltas(choice.text, ended=finish_reason is not None) or [{}] * has_more
            finish_reason = parts.finish_reason(finish_reason)
        pieces += [_piece(choice.index, delta) for delta in deltas]
        if deltas:  # what belongs to the tokens of several pieces goes with the first
            pieces[-len(deltas)] |= {"logprobs": self._logprobs(choice), **ids}
        if finish_reason is not None:
            end = _piece(choice.index, {})
            pieces.append({**end, "finish_reason": finish_reason, "stop_reason": choice.stop_reason})
        return pieces

    def _of_prompt(self, output: RequestOutput) -> Content:
        found: Content = {}
        if self._call.wants_prompt_logprobs:
            found["prompt_logprobs"] = choice_parts.prompt_logprobs(output.prompt_logprobs)
        if self._call.options.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        if self._call.wants_prompt_text:
            decode = self._engine.get_tokenizer().decode
            found["prompt_text"] = decode(output.prompt_token_ids, skip_special_tokens=False)
        return found

    def _token_ids(self, choice: CompletionOutput) -> Content:
        return {"token_ids": choice.token_ids} if self._call.options.return_token_ids else {}

    def _logprobs(self, choice: CompletionOutput) -> Content | None:
        top = self._call.top_logprobs
        if top is None:
            return None
        return choice_parts.chat_logprobs(choice, top, self._call.params.logprob_token_ids or (), self._token_names())


async def encode_conversation(context: ServerContext, conversation: Conversation, caller: Caller) -> list[int]:
    """Token ids of a conversation under the model's template."""
    add_prompt = conversation.add_generation_prompt
    return await context.engine.encode_chat(
        [_as_template(message) for message in conversation.messages],
        add_generation_prompt=not conversation.continue_final_message if add_prompt is None else add_prompt,
        continue_final_message=conversation.continue_final_message,
        chat_template=conversation.chat_template,
        tools=tools_of(conversation)[0] or None,
        documents=conversation.documents or None,
        add_special_tokens=conversation.add_special_tokens,
        chat_template_kwargs={**conversation.chat_template_kwargs, **conversation.own_arguments},
        caller=caller,
    )


def _as_template(message: Message) -> Content:
    """A message as templates take it: few know the newer name of the system role."""
    role = "system" if message.role == "developer" else message.role
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    more: Content = {"name": message.name, "reasoning_content": reasoning, "tool_call_id": message.tool_call_id}
    if message.tool_calls:
        more["tool_calls"] = [_call_as_template(call) for call in message.tool_calls]
    return {"role": role, "content": text_of(message.content), **{k: v for k, v in more.items() if v is not None}}


def _call_as_template(call: MessageCall) -> Content:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"type": "function", "function": function} | ({} if call.id is None else {"id": call.id})


def _piece(index: int, delta: Content) -> Content:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
