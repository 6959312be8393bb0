"""The bodies of Anthropic's Messages API, field by field.

What it asks of Anthropic's own machines (containers, searches, files, places, speeds) is refused by name. Labels change
no answer and are not kept. Content blocks are one struct with the fields of all kinds: `parse` checks more.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from quire import sampling_params as sampling
from quire.server.answers.fields import sampling_field
from quire.server.http.schema import Field, Flattened, Refused, RequestSchema

MOST_TOKENS = 2**31 - 1
TOOL_NAME = r"^[A-Za-z0-9_.\-]{1,128}$(?!\n)"
CACHED = "a label: prefixes are cached by their content, while there is room; usage says what was read and written"
_TEXT_ONLY = "this server reads text only"
_THEIRS = "it is a service of Anthropic's own machines"
_Count = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
_Name = Annotated[str, Meta(pattern=TOOL_NAME)]
_NAME_IS = "be 1 to 128 letters, digits and any of _ . -"


class CacheControlParam(msgspec.Struct, forbid_unknown_fields=True):
    """How long a prompt may be cached."""

    type: Annotated[Literal["ephemeral"], Field(CACHED, "be ephemeral")]
    ttl: Annotated[Literal["5m", "1h", None], Field(CACHED, "be 5m or 1h")] = None


Hint = Annotated[CacheControlParam | None, Field(CACHED, "be an object")]


class TextBlockParam(msgspec.Struct, forbid_unknown_fields=True):
    """A text among those of the system or of a tool's result."""

    type: Annotated[Literal["text"], Field("the kind of block")]
    text: Annotated[str, Field("its text")]
    cache_control: Hint = None
    citations: Annotated[None, Refused("this server cites nothing")] = None
    unsupported: ClassVar[str] = f"{_TEXT_ONLY}: blocks of type text"


class CallerParam(msgspec.Struct, forbid_unknown_fields=True):
    """Who called a tool."""

    type: Annotated[Literal["direct"], Field("the model itself", "be direct")]


class BlockParam(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message. Beside `type`, each kind has fields of its own."""

    type: Annotated[Literal["text", "tool_use", "tool_result", "thinking"], Field("the kind of block")]
    text: Annotated[str | None, Field("of text: the text")] = None
    id: Annotated[str | None, Field("of tool_use: the name of the call, for its result")] = None
    name: Annotated[_Name | None, Field("of tool_use: the tool", _NAME_IS)] = None
    input: Annotated[dict[str, Any] | None, Field("of tool_use: the arguments", "be an object")] = None
    tool_use_id: Annotated[str | None, Field("of tool_result: the call that this is the result of")] = None
    content: Annotated[
        str | list[TextBlockParam] | None,
        Field("of tool_result: what the tool gave; blocks are joined by line ends", "be a string or a list of blocks"),
    ] = None
    is_error: Annotated[bool | None, Field("of tool_result: true writes `Error: ` before it")] = None
    thinking: Annotated[str | None, Field("of thinking: for templates that read it; others leave it out")] = None
    signature: Annotated[str | None, Field("of thinking: a label; it is not checked")] = None
    caller: Annotated[CallerParam | None, Field("of tool_use: a label", "be an object")] = None
    cache_control: Hint = None
    citations: Annotated[None, Refused("this server cites nothing")] = None
    unsupported: ClassVar[str] = f"{_TEXT_ONLY}: blocks of type text, tool_use, tool_result and thinking"


class MessageParam(msgspec.Struct, forbid_unknown_fields=True):
    """One turn. Neighbours of one role are one turn."""

    role: Annotated[
        Literal["user", "assistant"], Field("whose it is; see system for the third", "be user or assistant")
    ]
    content: Annotated[
        str | Annotated[list[BlockParam], Meta(min_length=1)],
        Field("a text, or blocks; texts are joined by line ends", "be a string or a list of blocks that is not empty"),
    ]


class ToolParam(msgspec.Struct, forbid_unknown_fields=True):
    """What the model may call."""

    name: Annotated[_Name, Field("of the tool", _NAME_IS)]
    input_schema: Annotated[
        dict[str, Any], Field("a JSON schema of an object, which the input is held to", "be an object")
    ]
    type: Annotated[Literal["custom", None], Field("the kind of tool")] = None
    description: Annotated[str | None, Field("what it does, for the model")] = None
    strict: Annotated[bool | None, Field("input is always held to the schema; true: to its named properties alone")] = (
        None
    )
    eager_input_streaming: Annotated[bool | None, Field("a label: input is always sent as it comes")] = None
    cache_control: Hint = None
    input_examples: Annotated[None, Refused("say them in the description")] = None
    allowed_callers: Annotated[None, Refused(_THEIRS)] = None
    defer_loading: Annotated[Literal[False, None], Refused(_THEIRS)] = None
    unsupported: ClassVar[str] = "this server runs no tools: those of type custom alone are known"


class ToolChoiceParam(msgspec.Struct, forbid_unknown_fields=True):
    """Whether tools are called."""

    type: Annotated[
        Literal["auto", "any", "tool", "none"],
        Field("the model decides; at least one; the named one; none", "be auto, any, tool or none"),
    ]
    name: Annotated[str | None, Field("with tool: its name")] = None
    disable_parallel_tool_use: Annotated[bool | None, Field("at most one call")] = None


class ThinkingParam(msgspec.Struct, forbid_unknown_fields=True):
    """Whether the model reasons before it answers."""

    type: Annotated[
        Literal["enabled", "disabled", "adaptive"],
        Field("passed to templates as `enable_thinking`", "be enabled, disabled or adaptive"),
    ]
    budget_tokens: Annotated[
        _Count | None,
        Field("with enabled: tokens of reasoning at most, fewer than max_tokens", "be a whole number of at least 1"),
    ] = None
    display: Annotated[
        Literal["summarized", "omitted", None],
        Field(
            "omitted: blocks of thinking hold no text; summarized: all of it, unabridged", "be summarized or omitted"
        ),
    ] = None


class OutputFormatParam(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer is held to."""

    type: Annotated[Literal["json_schema"], Field("the kind", "be json_schema")]
    schema: Annotated[dict[str, Any], Field("a JSON schema, which the text is held to", "be an object")]


class OutputConfigParam(msgspec.Struct, forbid_unknown_fields=True):
    """Form and effort."""

    format: Annotated[OutputFormatParam | None, Field("the answer is JSON that a schema holds", "be an object")] = None
    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max", None],
        Field("given to templates that read it, as reasoning_effort", "be low, medium, high, xhigh or max"),
    ] = None


class MetadataParam(msgspec.Struct, forbid_unknown_fields=True):
    """Labels."""

    user_id: Annotated[str | None, Field("a label: it changes no answer and is not kept", limit="label_characters")] = (
        None
    )


class Conversation(msgspec.Struct, kw_only=True):
    """What a prompt is made of."""

    model: Annotated[str, Field("one of the served names")]
    messages: Annotated[
        Annotated[list[MessageParam], Meta(min_length=1)],
        Field(
            "the conversation; a last message of the assistant is gone on with",
            "be a list that is not empty",
            limit="messages",
        ),
    ]
    system: Annotated[
        str | list[TextBlockParam] | None,
        Field("what stands before it; blocks are joined by line ends", "be a string or a list of text blocks"),
    ] = None
    tools: Annotated[list[ToolParam], Field("what the model may call", "be a list of tools", limit="tools")] = []
    tool_choice: Annotated[
        ToolChoiceParam | None, Field("whether tools are called; left out: auto", "be an object")
    ] = None
    thinking: Annotated[
        ThinkingParam | None,
        Field(
            "reasoning before the answer; left out: disabled, and what is thought all the same is left out",
            "be an object",
        ),
    ] = None
    output_config: Annotated[OutputConfigParam | None, Field("form and effort of the answer", "be an object")] = None
    cache_control: Hint = None
    speed: Annotated[Literal["standard"] | None, Field("a label: there is one", "be standard")] = None


REFUSED = {
    "billing_policy": Refused("nothing is billed here"),
    "compaction": Refused("edit the messages yourself"),
    "container": Refused(_THEIRS),
    "context_management": Refused("edit the messages yourself", ({"edits": []},)),
    "diagnostics": Refused("usage says what the cache supplied"),
    "fallback_credit_token": Refused("nothing is billed here"),
    "fallbacks": Refused("name one model"),
    "inference_geo": Refused(_THEIRS),
    "mcp_servers": Refused("this server runs no tools", ([],)),
    "output_format": Refused("it is the older name of output_config.format"),
    "thread": Refused("conversations are not kept: send all messages"),
    "user_profile_id": Refused(_THEIRS),
    "workspace_id": Refused(_THEIRS),
}
SAMPLING = {
    "temperature": sampling_field("temperature", "0 takes the most probable token"),
    "top_p": sampling_field("top_p", "keep the most probable tokens up to this mass"),
    "top_k": sampling_field("top_k", "keep this many tokens; 0 and -1 keep all"),
}


class MessagesBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages."""

    conversation: Annotated[Conversation, Flattened()]
    max_tokens: Annotated[
        _Count,
        Field(
            "tokens to generate at most; where the model's length ends the answer before, stop_reason says so",
            f"be a whole number from 1 to {MOST_TOKENS}",
        ),
    ]
    stream: Annotated[bool, Field("send the answer as it comes, as server-sent events")] = False
    stop_sequences: Annotated[
        Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=sampling.MAX_STOP_STRINGS)] | None,
        Field(
            "strings that end the answer; stop_sequence says which did",
            f"be a list of at most {sampling.MAX_STOP_STRINGS} strings that are not empty",
        ),
    ] = None
    metadata: Annotated[MetadataParam | None, Field("labels", "be an object")] = None
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None,
        Field("a label: there is one tier, and usage names it (standard)", "be auto or standard_only"),
    ] = None
    sampling: Annotated[dict[str, Any], Flattened(SAMPLING | REFUSED)]


class CountBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    conversation: Annotated[Conversation, Flattened()]
    refused: Annotated[dict[str, Any], Flattened(REFUSED)]


MESSAGES = RequestSchema(MessagesBody)
COUNT = RequestSchema(CountBody)
