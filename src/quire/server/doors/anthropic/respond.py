"""Answers in Anthropic's shape: blocks of content, as the events of a stream or put together as a message."""

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from quire.engine.tools import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quire.outputs import RequestOutput
from quire.server.answers.single import Prompt, SingleAnswer
from quire.server.doors.anthropic.parse import Call
from quire.server.http.context import RequestContext, ServerContext

Body = dict[str, Any]
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "repetition": "end_turn"}


class Blocks:
    """The blocks of one answer, as events: one block is open at a time.

    Args:
        shows_thinking: whether reasoning is part of the answer.
        omits_thinking: its blocks hold no text.
    """

    def __init__(self, *, shows_thinking: bool, omits_thinking: bool) -> None:
        self._shows_thinking, self._omits_thinking = shows_thinking, omits_thinking
        self._num_blocks = 0
        self._open: str | None = None
        self._thought = ""

    def push(self, events: Iterable[Event]) -> list[Body]:
        """What more of the answer says."""
        found: list[Body] = []
        for event in events:
            match event:
                case Content(text):
                    found += self._more(
                        "text", {"type": "text", "text": "", "citations": None}, "text_delta", "text", text
                    )
                case Reasoning(text) if self._shows_thinking:
                    self._thought += text
                    shown = "" if self._omits_thinking else text
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    found += self._more("thinking", block, "thinking_delta", "thinking", shown)
                case CallStart(_, name):
                    identity = f"toolu_{secrets.token_hex(12)}"
                    found += self._begin("tool_use", {"type": "tool_use", "id": identity, "name": name, "input": {}})
                case CallArguments(_, text):
                    found.append(self._delta("input_json_delta", "partial_json", text))
                case CallEnd(_):
                    found += self.end()
        return found

    def end(self) -> list[Body]:
        """Close the open block."""
        found: list[Body] = []
        if self._open == "thinking":
            signature = hashlib.blake2b(self._thought.encode(), digest_size=16).hexdigest()
            found.append(self._delta("signature_delta", "signature", signature))
            self._thought = ""
        if self._open is not None:
            found.append({"type": "content_block_stop", "index": self._num_blocks - 1})
        self._open = None
        return found

    def _begin(self, kind: str, block: Body) -> list[Body]:
        found = self.end()
        self._open = kind
        self._num_blocks += 1
        return [*found, {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}]

    def _more(self, kind: str, block: Body, delta: str, field: str, text: str) -> list[Body]:
        found = [] if self._open == kind else self._begin(kind, block)
        return [*found, self._delta(delta, field, text)] if text else found

    def _delta(self, kind: str, field: str, text: str) -> Body:
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}


def put_together(events: Iterable[Body]) -> list[Body]:
    """The blocks that events tell of. A call that was cut off has no input."""
    blocks: list[Body] = []
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            kind, (field, text) = event["delta"]["type"], list(event["delta"].items())[1]
            if kind == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + text
            else:
                blocks[event["index"]][field] += text
    for index, text in arguments.items():
        try:
            blocks[index]["input"] = json.loads(text)
        except ValueError:
            continue
    return blocks


class MessageAnswer(SingleAnswer):
    """Of /v1/messages."""

    def __init__(self, context: ServerContext, call: Call, request: RequestContext) -> None:
        super().__init__(context, request, f"msg_{secrets.token_hex(12)}")
        self._call = call
        self._model = context.resolve_name(call.model)
        self._blocks = Blocks(shows_thinking=call.shows_thinking, omits_thinking=call.omits_thinking)
        self._has_begun = False

    def headers(self) -> dict[str, str]:
        """The answer's id is the request's too."""
        return {**super().headers(), "request-id": self._id}

    async def _prompt(self) -> Prompt:
        return await self._call.chat.prompt(self._context, self._request.caller)

    def _content(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> Body:
        blocks = put_together([*self._blocks.push(events), *self._blocks.end()])
        return {**self._message(blocks), **self._ending(output, finish_reason), "usage": self._usage()}

    def _pieces(self, output: RequestOutput, events: Sequence[Event], finish_reason: str | None) -> list[Body]:
        found: list[Body] = []
        if not self._has_begun:
            self._has_begun = True
            usage = {**self._usage(), "output_tokens": 0}
            ending = {"stop_reason": None, "stop_sequence": None}
            found += [{"type": "message_start", "message": {**self._message([]), **ending, "usage": usage}}]
            found += [{"type": "ping"}]
        found += self._blocks.push(events)
        if finish_reason is not None:
            found += self._blocks.end()
            found += [
                {"type": "message_delta", "delta": self._ending(output, finish_reason), "usage": self._usage()},
                {"type": "message_stop"},
            ]
        return found

    def _message(self, blocks: list[Body]) -> Body:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": blocks}

    def _ending(self, output: RequestOutput, finish_reason: str | None) -> Body:
        """Why it ended: a length that is not the one that was asked for is the model's own."""
        stopped_by = output.outputs[0].stop_reason
        if finish_reason == "length":
            is_asked = self._counted.num_tokens >= (self._call.chat.params.max_tokens or 0)
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
        elif finish_reason == "stop" and isinstance(stopped_by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
        else:
            reason = _STOP_REASONS[finish_reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> Body:
        """Tokens of the prompt are counted once: read from the prefix cache, written to it (whole blocks are), or
        neither."""
        prompt, read, block = self._counted.num_prompt_tokens, None, self._engine.prefix_block_size
        written = None
        if self._context.show_cached_tokens:
            read = self._counted.num_cached_tokens
            written = 0 if block is None else max(0, prompt // block * block - read)
        return {
            "input_tokens": prompt - (read or 0) - (written or 0),
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "output_tokens": self._counted.num_tokens,
            "service_tier": "standard",
        }
