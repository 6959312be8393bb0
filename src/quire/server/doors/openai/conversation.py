"""Conversations as OpenAI's API has them: messages, their parts and calls, tools, and what the template is given."""

from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec
from msgspec import Meta

from quire.server.http.limits import Limits
from quire.server.http.schema import Field, Refused, Schema

ARGUMENT_NAME = r"^[^\W\d_]\w{0,63}$"
"""Of an argument of the chat template: a name of Python's that is not private."""
TOOL_NAME = r"^[A-Za-z0-9_.\-]{1,64}$(?!\n)"
CACHED = "a label: prefixes are cached by their content, while there is room"
SpecialTokens = Annotated[bool, Field("the tokenizer adds its BOS and the like (templates write them)")]
_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Verbosity = Literal["low", "medium", "high"]


def one_of(values: Any) -> str:
    """What a refusal says of a field with these values."""
    return f"be one of {', '.join(get_args(values))}"


class CacheHint(msgspec.Struct, forbid_unknown_fields=True):
    """Where or how long a prompt may be cached, under Anthropic's and OpenAI's names."""

    type: Annotated[Literal["ephemeral"] | None, Field(CACHED, "be ephemeral")] = None
    mode: Annotated[Literal["implicit", "explicit"] | None, Field(CACHED, "be implicit or explicit")] = None
    ttl: Annotated[Literal["5m", "30m", "1h", "12h", "24h"] | None, Field(CACHED, "be 5m, 30m, 1h, 12h or 24h")] = None


Hint = Annotated[CacheHint | None, Field(CACHED, "be an object")]


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Annotated[Literal["text"], Field("the kind of part")]
    text: Annotated[str, Field("its text")]
    cache_control: Hint = None
    prompt_cache_breakpoint: Hint = None
    unsupported: ClassVar[str] = 'this server reads {"type": "text", "text": ...} only'


Empty = Annotated[list[Any], Meta(max_length=0)] | Annotated[str, Meta(max_length=0)] | None
NotYet = Annotated[Empty, Refused("audio, refusals and the older function_call are not in this version")]
"""Answers of other servers carry such fields; a client that sends history back may hold them empty."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
Name = Annotated[
    Annotated[str, Meta(pattern=TOOL_NAME)], Field("of the tool", "be 1 to 64 letters, digits and any of _ . -")
]
FunctionOnly = Annotated[Literal["function"], Field("the kind of tool", "be function")]
_Place = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_NO_OTHER_TOOLS = "this server knows tools of type function only"


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """What an earlier turn of the assistant called."""

    name: Name
    arguments: Annotated[str | dict[str, Any], Field("JSON text of an object, or the object", "be text or an object")]
    parsed_arguments: Annotated[Any, Field("a label that a client of OpenAI's leaves: what it read of the text")] = None


class MessageCall(msgspec.Struct, forbid_unknown_fields=True):
    """One call in an earlier turn of the assistant."""

    function: Annotated[CalledFunction, Field("name and arguments", "be an object")]
    id: Annotated[str | None, Field("the name of the call, for the message with its result")] = None
    type: FunctionOnly = "function"
    index: Annotated[_Place | None, Field("a label: its place, as streams have it", "be a whole number")] = None
    unsupported: ClassVar[str] = _NO_OTHER_TOOLS


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Annotated[Role, Field("templates read developer as system", one_of(Role))]
    content: Annotated[
        str | Annotated[list[str | TextPart], Meta(min_length=1)] | None,
        Field(
            "text; parts are joined by line ends; null beside tool_calls alone",
            "be a string or a list of text parts",
            limit="content_parts",
        ),
    ] = None
    name: Annotated[str | None, Field("the speaker's name, for templates that read it")] = None
    tool_calls: Annotated[
        list[MessageCall] | None, Field("of the assistant's turn: what it called", "be a list of calls")
    ] = None
    tool_call_id: Annotated[str | None, Field("with role tool: the call that this is the result of")] = None
    function_call: NotYet = None
    refusal: NotYet = None
    audio: NotYet = None
    annotations: NotYet = None
    reasoning: Annotated[str | None, Field("another name of reasoning_content")] = None
    reasoning_content: Annotated[
        str | None, Field("of the assistant's turn: for templates that read it; others leave it out")
    ] = None
    parsed: Annotated[Any, Field("a label that a client of OpenAI's leaves: what it read of the content")] = None
    cache_control: Hint = None


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """What the model may call."""

    name: Name
    description: Annotated[str | None, Field("what it does, for the model")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        Field("a JSON schema of an object, which the arguments are held to; left out: no arguments", "be an object"),
    ] = None
    strict: Annotated[
        bool | None, Field("arguments are always held to the schema; true: to its named properties alone")
    ] = None


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    """One tool."""

    type: FunctionOnly
    function: Annotated[Function, Field("name, description, parameters", "be an object")]
    unsupported: ClassVar[str] = _NO_OTHER_TOOLS


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The name of a tool."""

    name: Name


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool by its name."""

    type: FunctionOnly
    function: Annotated[NamedFunction, Field("its name", "be an object")]
    unsupported: ClassVar[str] = _NO_OTHER_TOOLS


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """Some of the tools."""

    mode: Annotated[Literal["auto", "required"], Field("whether one must be called", "be auto or required")]
    tools: Annotated[Annotated[list[NamedTool], Meta(min_length=1)], Field("which", "be a list that is not empty")]


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The tool that is called, or those that may be."""

    type: Annotated[Literal["function", "allowed_tools"], Field("which of the two", "be function or allowed_tools")]
    function: Annotated[NamedFunction | None, Field("with function: its name", "be an object")] = None
    allowed_tools: Annotated[AllowedTools | None, Field("with allowed_tools: which, and how", "be an object")] = None


def _template_arguments(limits: Limits) -> Schema:
    names = {"pattern": ARGUMENT_NAME}
    return {"type": "object", "maxProperties": limits.template_arguments.value, "propertyNames": names}


class Conversation(msgspec.Struct, kw_only=True):
    """What the chat template makes a prompt of."""

    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)],
        Field("the conversation", "be a list that is not empty", limit="messages"),
    ]
    add_generation_prompt: Annotated[
        bool | None, Field("end with the beginning of the assistant's turn; yes, unless continue_final_message")
    ] = None
    continue_final_message: Annotated[bool, Field("leave the last message, the assistant's, open")] = False
    chat_template: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Field(
            "a template instead of the model's, where the server runs with --trust-request-chat-template",
            "be a string that is not empty",
            limit="chat_template_characters",
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Field("arguments of the template", "be an object", limit="template_arguments", schema=_template_arguments),
    ] = {}
    reasoning_effort: Annotated[
        _Effort | None, Field("given to templates that read it; with others it changes nothing", one_of(_Effort))
    ] = None
    verbosity: Annotated[
        _Verbosity | None, Field("given to templates that read it; with others it changes nothing", one_of(_Verbosity))
    ] = None
    documents: Annotated[
        list[dict[str, str]],
        Field(
            "objects of strings, for templates that read them; refused for one that does not",
            "be a list of objects that hold strings by name",
            limit="documents",
        ),
    ] = []
    tools: Annotated[
        list[FunctionTool], Field("what the model may call", "be a list of tools of type function", limit="tools")
    ] = []
    add_special_tokens: SpecialTokens = False

    @property
    def own_arguments(self) -> dict[str, str]:
        """Arguments of the template that are fields of the request."""
        own = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def ends_with_assistant(self) -> bool:
        """True when the last message is the assistant's own."""
        return self.messages[-1].role == "assistant"
