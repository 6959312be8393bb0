"""The bodies of /v1/responses and /v1/conversations, field by field."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from quire.server.doors.openai.bodies import (
    CHAT_SAMPLING,
    METADATA,
    REFUSED,
    AnswerOptions,
    Metadata,
)
from quire.server.doors.openai.conversation import TOOL_NAME, one_of
from quire.server.http.schema import Field, Flattened, Refused, RequestSchema

_ItemKind = Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"]
_PartKind = Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
_Role = Literal["user", "system", "developer", "assistant"]
_Status = Literal["in_progress", "completed", "incomplete"]
_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Verbosity = Literal["low", "medium", "high"]
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
_Ignored = Annotated[Any, Field("a label that answers carry: sent back, it changes nothing")]
_Name = Annotated[str, Meta(pattern=TOOL_NAME)]
_NAME = "be 1 to 64 letters, digits and any of _ . -"
_FUNCTIONS_ONLY = "this server knows tools of type function only"


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message, of a call's result or of reasoning."""

    type: Annotated[_PartKind, Field("the kind of part")]
    text: Annotated[str | None, Field("its text")] = None
    refusal: Annotated[str | None, Field("of a part of type refusal: its text")] = None
    annotations: _Ignored = None
    logprobs: _Ignored = None
    parsed: _Ignored = None
    unsupported: ClassVar[str] = "this server reads text only: input_text, output_text, refusal"


class InputItem(msgspec.Struct, forbid_unknown_fields=True):
    """One item of the input, or of a conversation."""

    type: Annotated[_ItemKind, Field("the kind of item; left out: message")] = "message"
    role: Annotated[_Role | None, Field("of a message: who speaks", one_of(_Role))] = None
    content: Annotated[
        str | list[ContentPart] | None,
        Field("of a message or of reasoning", "be a string or a list of text parts", limit="content_parts"),
    ] = None
    id: Annotated[str | None, Field("of the item; with item_reference: of one that is stored")] = None
    status: Annotated[_Status | None, Field("a label that answers carry", one_of(_Status))] = None
    call_id: Annotated[str | None, Field("of a call, and of its result")] = None
    name: Annotated[_Name | None, Field("of a call: the function", _NAME)] = None
    arguments: Annotated[str | None, Field("of a call: JSON text of an object")] = None
    output: Annotated[
        str | list[ContentPart] | None, Field("of a call: what it gave", "be a string or a list of text parts")
    ] = None
    summary: Annotated[list[ContentPart] | None, Field("of reasoning: read where it has no content")] = None
    encrypted_content: Annotated[Any, Refused("reasoning is sent in the clear here")] = None
    parsed_arguments: _Ignored = None
    phase: _Ignored = None
    unsupported: ClassVar[str] = (
        "the input holds messages, function_call, function_call_output, reasoning and item_reference"
    )


class ResponseTool(msgspec.Struct, forbid_unknown_fields=True):
    """One tool of a response."""

    type: Annotated[Literal["function"], Field("the kind of tool")]
    name: Annotated[_Name, Field("of the tool", _NAME)]
    description: Annotated[str | None, Field("what it does, for the model")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        Field("a JSON schema of an object, which the arguments are held to; left out: no arguments", "be an object"),
    ] = None
    strict: Annotated[
        bool | None, Field("arguments are always held to the schema; true: to its named properties alone")
    ] = None
    unsupported: ClassVar[str] = _FUNCTIONS_ONLY


class AllowedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool by its name."""

    type: Annotated[Literal["function"], Field("the kind of tool")]
    name: Annotated[_Name, Field("of the tool", _NAME)]
    unsupported: ClassVar[str] = _FUNCTIONS_ONLY


class ResponseToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The tool that is called, or those that may be."""

    type: Annotated[Literal["function", "allowed_tools"], Field("which of the two", "be function or allowed_tools")]
    name: Annotated[_Name | None, Field("with function: its name", _NAME)] = None
    mode: Annotated[
        Literal["auto", "required"] | None,
        Field("with allowed_tools: whether one must be called", "be auto or required"),
    ] = None
    tools: Annotated[list[AllowedTool] | None, Field("with allowed_tools: which", "be a list of tools by name")] = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How text is written."""

    format: Annotated[
        dict[str, Any] | None,
        Field("of type text, json_object, or json_schema with name, schema and strict", "be an object with a type"),
    ] = None
    verbosity: Annotated[_Verbosity | None, Field("given to templates that read it", one_of(_Verbosity))] = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How the model thinks."""

    effort: Annotated[_Effort | None, Field("given to templates that read it", one_of(_Effort))] = None
    summary: Annotated[
        Literal["auto"] | None,
        Field("the answer holds the whole reasoning, and no summary of it", "be auto: nothing is summed up here"),
    ] = None
    generate_summary: Annotated[Any, Refused("it is OpenAI's older name of summary")] = None
    context: Annotated[Any, Refused("all items of the input are read")] = None


class EventOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream holds."""

    include_obfuscation: Annotated[bool | None, Field("false: nothing is obfuscated here", "be false")] = None


class ConversationName(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation."""

    id: Annotated[str, Field("its id")]


_NOT_OURS = ("n", "best_of", "max_tokens", "prompt_logprobs", "logprob_token_ids", "response_format")
RESPONSE_SAMPLING: dict[str, Field | Refused] = {
    name: field
    for name, field in (CHAT_SAMPLING | REFUSED).items()
    if name not in _NOT_OURS and not name.startswith("guided_") and name not in ("json_schema", "moderation")
} | {
    "max_output_tokens": Field(
        "tokens to generate at most, reasoning included; one that does not fit beside the prompt is refused",
        schema=CHAT_SAMPLING["max_tokens"].schema,
    ),
    "moderation": Refused("nothing is moderated by this server"),
    "prompt": Refused("no prompts are stored here: send instructions and input"),
    "context_management": Refused("nothing is compacted here", ([],)),
    "access_programs": Refused("there are none"),
    "image": Refused("this server reads and writes text only"),
    "multi_agent": Refused("one model answers"),
    "background_options": Refused("background work begins at once"),
    "max_tool_calls": Refused("it bounds tools that a server runs: this one runs none"),
}


_Metadata = Annotated[Metadata | None, Field("labels that are kept with it", METADATA)]


class InputBody(msgspec.Struct, kw_only=True):
    """What a response is an answer to."""

    input: Annotated[
        str | list[InputItem] | None,
        Field(
            "a text of the user, or items; may be left out beside previous_response_id or conversation",
            "be a string or a list of items",
            limit="input_items",
        ),
    ] = None
    instructions: Annotated[
        str | None, Field("the first message, of the system; not carried on to later responses")
    ] = None
    previous_response_id: Annotated[
        str | None, Field("go on from a response that is stored: its input and output stand before this input")
    ] = None
    conversation: Annotated[
        str | ConversationName | None,
        Field("go on with a conversation: its items stand before the input, and the new ones are added to it"),
    ] = None
    tools: Annotated[
        list[ResponseTool], Field("what the model may call", "be a list of tools of type function", limit="tools")
    ] = []
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ResponseToolChoice,
        Field(
            "whether tools are called: none, auto (the model decides), required, one of them, or allowed_tools",
            "be none, auto, required, or an object that names a function or allowed_tools",
        ),
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Field("an answer may hold several calls")] = True
    text: Annotated[TextOptions | None, Field("format: what the text is held to; verbosity", "be an object")] = None
    reasoning: Annotated[ReasoningOptions | None, Field("effort; summary", "be an object")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field("auto: the oldest items are left out where the input is too long", "be auto or disabled"),
    ] = None


class ResponseBody(InputBody, kw_only=True):
    """POST /v1/responses."""

    include: Annotated[
        list[Included] | None,
        Field(
            "message.output_text.logprobs: the log-probabilities of the text; reasoning.encrypted_content asks for "
            "nothing more: reasoning is in the answer, and can be sent back",
            "be a list of message.output_text.logprobs and reasoning.encrypted_content",
        ),
    ] = None
    store: Annotated[bool, Field("keep the response for a while; false: nothing of it is kept")] = True
    background: Annotated[bool, Field("answer at once, and work on: retrieve it later; needs store")] = False
    metadata: _Metadata = None
    stream_options: Annotated[EventOptions | None, Field("with stream", "be an object")] = None
    include_reasoning: Annotated[bool, Field("the answer holds the reasoning; false: it is left out")] = True
    thinking_token_budget: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None,
        Field("tokens of reasoning at most; then it is closed", "be a whole number of at least 0"),
    ] = None
    options: Annotated[AnswerOptions, Flattened()]
    sampling: Annotated[dict[str, Any], Flattened(RESPONSE_SAMPLING)]


class InputTokensBody(InputBody, kw_only=True):
    """POST /v1/responses/input_tokens."""

    model: Annotated[str | None, Field("one of the served names; left out: the first")] = None
    personality: Annotated[Any, Refused("templates have none: say it in instructions")] = None


class ConversationBody(msgspec.Struct, kw_only=True):
    """POST /v1/conversations."""

    items: Annotated[
        list[InputItem] | None, Field("what it begins with", "be a list of items", limit="added_items")
    ] = None
    metadata: _Metadata = None


class ConversationUpdateBody(msgspec.Struct, kw_only=True):
    """POST /v1/conversations/{id}."""

    metadata: Annotated[Metadata, Field("labels instead of those that are kept", METADATA)]


class ConversationItemsBody(msgspec.Struct, kw_only=True):
    """POST /v1/conversations/{id}/items."""

    items: Annotated[
        Annotated[list[InputItem], Meta(min_length=1)],
        Field("what is added", "be a list of items that is not empty", limit="added_items"),
    ]


RESPONSE = RequestSchema(ResponseBody)
INPUT_TOKENS = RequestSchema(InputTokensBody)
CONVERSATION = RequestSchema(ConversationBody)
CONVERSATION_UPDATE = RequestSchema(ConversationUpdateBody)
CONVERSATION_ITEMS = RequestSchema(ConversationItemsBody)
