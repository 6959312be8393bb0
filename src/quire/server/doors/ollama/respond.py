"""Answers in Ollama's shape: objects of one line each, the last of which tells of tokens and times."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from starlette.types import Scope

from quire.engine.tools import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quire.errors import InvalidRequestError, PromptTooLongError
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.answers.single import Prompt, SingleAnswer
from quire.server.doors.ollama.parse import Call
from quire.server.http.context import RequestContext, ServerContext, new_id

Body = dict[str, Any]
_DONE = {"tool_calls": "stop", "repetition": "stop"}


def moment() -> str:
    """Now, as RFC 3339 has it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def resolve(context: ServerContext, name: str) -> str:
    """The name to answer under: as it was asked for.

    Raises:
        ModelNotFoundError: it is not served here.
    """
    context.resolve_name(ours(context, name))
    return name


def ours(context: ServerContext, name: str) -> str:
    """A name without Ollama's tag, and the one that it was copied from."""
    if name in context.accepted_names:
        return name
    bare = name.removesuffix(":latest")
    return context.local.aliases.get(bare, bare)


def serving(context: ServerContext, name: str, scope: Scope) -> ServerContext:
    """What serves the model of a request: see `ServerContext.of_model`."""
    return context.of_model(ours(context, name), scope)


def defaults_of(context: ServerContext, body: Body) -> SamplingParams:
    """See `ServerContext.defaults_of`."""
    name = body.get("model")
    return context.defaults_of({"model": ours(context, name)} if isinstance(name, str) else {})


class OllamaAnswer(SingleAnswer):
    """Of both routes."""

    is_chat = False

    def __init__(self, context: ServerContext, call: Call, request: RequestContext) -> None:
        super().__init__(context, request, new_id("ollama"))
        self._call = call
        self._model = resolve(context, call.model)
        self._name_of_call, self._arguments, self._num_calls = "", "", 0
        self._token_ids: list[int] = []
        answers = context.engine.answer_format
        if call.wants_thinking and (answers is None or answers.reasoning is None):
            raise InvalidRequestError(f"{call.model[:256]!r} does not support thinking", param="think")

    async def _prompt(self) -> Prompt:
        call, engine, caller = self._call, self._engine, self._request.caller
        if call.num_ctx is not None and call.num_ctx > engine.max_model_len:
            text = f"options.num_ctx may be at most {engine.max_model_len} (--max-model-len), got {call.num_ctx}"
            raise InvalidRequestError(text, param="options.num_ctx")
        if call.chat is None:
            prompt = Prompt(token_ids=await engine.encode(call.raw or "", caller=caller), params=call.params)
        else:
            prompt = await call.chat.prompt(self._context, caller)
        if call.context:
            bos, ids = engine.get_tokenizer().bos_token_id, prompt.token_ids
            fresh = ids[1:] if bos is not None and ids and ids[0] == bos else ids
            prompt = replace(prompt, token_ids=[*call.context, *fresh])
        return self._within(prompt)

    def _within(self, prompt: Prompt) -> Prompt:
        """Prompt and answer within `num_ctx`."""
        if self._call.num_ctx is None:
            return prompt
        room = self._call.num_ctx - len(prompt.token_ids)
        if room < 1:
            text = f"the prompt has {len(prompt.token_ids)} tokens, and options.num_ctx is {self._call.num_ctx}"
            raise PromptTooLongError(text, param="options.num_ctx")
        most = prompt.params.max_tokens
        return replace(prompt, params=replace(prompt.params, max_tokens=room if most is None else min(room, most)))

    def _content(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> Body:
        self._token_ids += output.outputs[0].token_ids
        said, thought, calls = self._told(events)
        return {**self._part(said, thought, calls), **self._end(output, finish_reason)}

    def _pieces(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> list[Body]:
        self._token_ids += output.outputs[0].token_ids
        said, thought, calls = self._told(events)
        found = [{**self._part(said, thought, calls), "done": False}] if said or thought or calls else []
        if finish_reason is not None:
            found.append({**self._part("", "", []), **self._end(output, finish_reason)})
        return found

    def _told(self, events: Iterable[Event]) -> tuple[str, str, list[Body]]:
        """What is said, thought and called. A call comes when it is whole; one that is cut off does not."""
        said, thought = "", ""
        calls: list[Body] = []
        for event in events:
            match event:
                case Content(text):
                    said += text
                case Reasoning(text) if self._call.shows_thinking:
                    thought += text
                case CallStart(_, name):
                    self._name_of_call, self._arguments = name, ""
                case CallArguments(_, text):
                    self._arguments += text
                case CallEnd(index):
                    arguments = json.loads(self._arguments or "{}")
                    calls.append({"function": {"index": index, "name": self._name_of_call, "arguments": arguments}})
        return said, thought, calls

    def _part(self, said: str, thought: str, calls: list[Body]) -> Body:
        thinking = {"thinking": thought} if thought else {}
        head: Body = {"model": self._model, "created_at": moment()}
        if not self.is_chat:
            return {**head, "response": said, **thinking}
        called = {"tool_calls": calls} if calls else {}
        return {**head, "message": {"role": "assistant", "content": said, **thinking, **called}}

    def _end(self, output: RequestOutput, finish_reason: str | None) -> Body:
        """The model is loaded when the server starts: that takes nothing of a request's time."""
        arrival, scheduled, first, last = self._counted.clock()
        found: Body = {"done": True, "done_reason": _DONE.get(finish_reason or "", finish_reason)}
        if not self.is_chat and self._call.raw is None:
            found["context"] = [*output.prompt_token_ids, *self._token_ids]
        return {
            **found,
            "total_duration": _nanoseconds(arrival, last),
            "load_duration": 0,
            "prompt_eval_count": self._counted.num_prompt_tokens,
            "prompt_eval_duration": _nanoseconds(scheduled, first),
            "eval_count": self._counted.num_tokens,
            "eval_duration": _nanoseconds(first, last),
        }


class OllamaChatAnswer(OllamaAnswer):
    """Of /api/chat."""

    is_chat = True


def nothing_asked(context: ServerContext, call: Call, *, is_chat: bool) -> Body:
    """The answer to a body without a prompt, which is sent to have the model loaded."""
    head: Body = {"model": resolve(context, call.model), "created_at": moment()}
    said: Body = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return {**head, **said, "done": True, "done_reason": "load"}


def _nanoseconds(start_s: float | None, end_s: float | None) -> int:
    return 0 if start_s is None or end_s is None else max(0, round(1e9 * (end_s - start_s)))
