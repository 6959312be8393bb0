"""The bodies of Ollama's API, field by field.

Options that say how a model is loaded are let through with Ollama's own defaults: here that is said when the server
starts. `keep_alive` is kept by a model that stays for as long as the server runs.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from quire import sampling_params as sampling
from quire.server.answers.fields import sampling_field, strings
from quire.server.http.limits import Limits
from quire.server.http.schema import Field, Flattened, Refused, RequestSchema, Schema

_AT_START = "it is said when the server starts"
_ONE_SAMPLER = "this version has no such sampler"
_TEXT_ONLY = "this server reads text only"
_LOGPROBS = Refused("/v1/chat/completions and /v1/completions give them", (False, 0))
_Images = Annotated[Annotated[list[Any], Meta(max_length=0)] | None, Refused(_TEXT_ONLY)]
DURATION = r"^-?([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,4}$(?!\n)|^-?[0-9]{1,9}$(?!\n)"
_Place = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Seconds = Annotated[float, Meta(ge=-1e9, le=1e9)]

OPTIONS = {
    "num_predict": Field(
        "tokens to generate at most; left out, -1 and -2: what fits",
        schema={"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2**31 - 1}, {"enum": [-1, -2]}]},
    ),
    "num_ctx": Field(
        "tokens of prompt and answer at most, within --max-model-len",
        schema={"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    ),
    "temperature": sampling_field("temperature", "0 takes the most probable token"),
    "top_k": sampling_field("top_k", "keep this many tokens; 0 and -1 keep all"),
    "top_p": sampling_field("top_p", "keep the most probable tokens up to this mass"),
    "min_p": sampling_field("min_p", "drop tokens less probable than this share of the best one's"),
    "typical_p": sampling_field("typical_p", "keep tokens whose surprise is nearest to the expected, up to this mass"),
    "seed": sampling_field("seed", "makes sampling repeat"),
    "stop": Field("strings that end the answer", schema=strings(sampling.MAX_STOP_STRINGS)),
    "repeat_penalty": sampling_field("repetition_penalty", "above 1 against tokens of prompt and answer"),
    "presence_penalty": sampling_field("presence_penalty", "against tokens that occurred in the answer"),
    "frequency_penalty": sampling_field(
        "frequency_penalty", "against tokens, by how often they occurred in the answer"
    ),
    "repeat_last_n": Refused("repeat_penalty reads all of prompt and answer", (-1,)),
    "num_keep": Refused("no prompt is shifted out: an answer ends where the context is full", (0, 4, -1)),
    "tfs_z": Refused(_ONE_SAMPLER, (1.0,)),
    "mirostat": Refused(_ONE_SAMPLER, (0,)),
    "mirostat_tau": Refused(_ONE_SAMPLER, (5.0,)),
    "mirostat_eta": Refused(_ONE_SAMPLER, (0.1,)),
    "penalize_newline": Refused("penalties hold for every token", (True,)),
    "num_batch": Refused(f"{_AT_START}, as --max-num-batched-tokens", (512,)),
    "num_gpu": Refused(_AT_START, (-1,)),
    "main_gpu": Refused(_AT_START, (0,)),
    "num_thread": Refused(_AT_START, (0,)),
    "use_mmap": Refused(_AT_START, (True,)),
    **{name: Refused(_AT_START, (False,)) for name in ("numa", "low_vram", "use_mlock", "vocab_only", "logits_all")},
    "f16_kv": Refused(_AT_START, (True,)),
    "embedding_only": Refused("this version makes no vectors", (False,)),
}


class OptionsBody(msgspec.Struct, kw_only=True):
    """`options` of a body."""

    sampling: Annotated[dict[str, Any], Flattened(OPTIONS)]


OPTIONS_SCHEMA = RequestSchema(OptionsBody)


def _options(limits: Limits) -> Schema:
    return OPTIONS_SCHEMA.json_schema(limits)[0]


class OllamaFunction(msgspec.Struct, forbid_unknown_fields=True):
    """What an earlier turn called."""

    name: Annotated[str, Field("of the tool")]
    arguments: Annotated[dict[str, Any], Field("of the call", "be an object")] = {}
    index: Annotated[_Place | None, Field("a label: its place", "be a whole number")] = None


class OllamaCall(msgspec.Struct, forbid_unknown_fields=True):
    """One call of an earlier turn."""

    function: Annotated[OllamaFunction, Field("name and arguments", "be an object")]
    id: Annotated[str | None, Field("the name of the call")] = None


class OllamaMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message."""

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        Field("whose it is", "be one of system, user, assistant, tool"),
    ]
    content: Annotated[str | None, Field("its text")] = None
    thinking: Annotated[str | None, Field("of the assistant's: for templates that read it")] = None
    tool_calls: Annotated[
        list[OllamaCall] | None, Field("of the assistant's: what it called", "be a list of calls")
    ] = None
    tool_name: Annotated[str | None, Field("of a tool's: which it was")] = None
    tool_call_id: Annotated[str | None, Field("of a tool's: the call that this is the result of")] = None
    images: _Images = None


class OllamaToolFunction(msgspec.Struct, forbid_unknown_fields=True):
    """What may be called."""

    name: Annotated[str, Field("of the tool")]
    description: Annotated[str | None, Field("what it does, for the model")] = None
    parameters: Annotated[
        dict[str, Any] | None, Field("a JSON schema of an object, which the arguments are held to", "be an object")
    ] = None


class OllamaTool(msgspec.Struct, forbid_unknown_fields=True):
    """One tool."""

    function: Annotated[OllamaToolFunction, Field("name, description, parameters", "be an object")]
    type: Annotated[Literal["function"], Field("the kind of tool", "be function")] = "function"
    unsupported: ClassVar[str] = "this server knows tools of type function only"


class Asking(msgspec.Struct, kw_only=True):
    """What both routes take."""

    model: Annotated[str, Field("one of the served names, with or without :latest")]
    stream: Annotated[bool, Field("send the answer as it comes, a line of JSON for each part")] = True
    format: Annotated[
        Literal["", "json"] | dict[str, Any],
        Field("the answer is JSON, or JSON that this schema holds", "be json or a JSON schema"),
    ] = ""
    options: Annotated[dict[str, Any], Field("how the answer is sampled", "be an object", schema=_options)] = {}
    keep_alive: Annotated[
        Annotated[str, Meta(pattern=DURATION)] | _Seconds | None,
        Field("how long the model stays at least: it stays for as long as the server runs, so 0 is refused",
              "be seconds, or a duration such as 5m"),
    ] = None  # fmt: skip
    think: Annotated[
        bool | Literal["low", "medium", "high", "max"] | None,
        Field(
            "reasoning before the answer, given to templates as enable_thinking and reasoning_effort; false: it is"
            " left out of the answer too; left out: the template decides",
            "be true, false, low, medium, high or max",
        ),
    ] = None


class OllamaChatBody(msgspec.Struct, kw_only=True):
    """POST /api/chat."""

    asking: Annotated[Asking, Flattened()]
    messages: Annotated[list[OllamaMessage], Field("the conversation; none: nothing is asked", "be a list of messages",
                                                   limit="messages")] = []  # fmt: skip
    tools: Annotated[list[OllamaTool], Field("what the model may call", "be a list of tools", limit="tools")] = []
    refused: Annotated[dict[str, Any], Flattened({"logprobs": _LOGPROBS, "top_logprobs": _LOGPROBS})]


_REFUSED = {
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "suffix": Refused("filling in the middle is not supported in this version", ("",)),
    "template": Refused("the model's own is used; raw leaves it out", ("",)),
    "images": Refused(_TEXT_ONLY, ([],)),
    **{name: Refused("this server makes no images", (0,)) for name in ("width", "height", "steps")},
}


class OllamaGenerateBody(msgspec.Struct, kw_only=True):
    """POST /api/generate."""

    asking: Annotated[Asking, Flattened()]
    prompt: Annotated[str, Field("a message of the user; with raw, the prompt as it is; empty: nothing is asked")] = ""
    system: Annotated[str, Field("stands before it")] = ""
    raw: Annotated[bool, Field("leave the chat template out")] = False
    context: Annotated[
        list[Annotated[int, Meta(ge=0, le=2**31 - 1)]],
        Field("of an answer before: go on from there", "be a list of token ids", limit="detokenized_tokens"),
    ] = []
    refused: Annotated[dict[str, Any], Flattened(_REFUSED)]


_OLDER_NAME = ("name",)
"""Of `model`: the Go client sends both."""


class OllamaShowBody(msgspec.Struct, kw_only=True):
    """POST /api/show."""

    model: Annotated[str, Field("one of the served names, with or without :latest", aliases=_OLDER_NAME)]
    verbose: Annotated[bool, Field("nothing more is known")] = False
    refused: Annotated[dict[str, Any], Flattened({
        "system": Refused("nothing is made of it: send it to /api/chat or /api/generate", ("",)),
        "template": Refused("the model's own is shown", ("",)),
        "options": Refused("the model's own are shown", ({},)),
    })]  # fmt: skip


class OllamaPullBody(msgspec.Struct, kw_only=True):
    """POST /api/pull."""

    model: Annotated[
        str,
        Field(
            "a served name: there is nothing to do; or `ID[:revision]` of the hub, which an operator may fetch",
            aliases=_OLDER_NAME,
        ),
    ]
    stream: Annotated[bool, Field("in lines")] = True
    refused: Annotated[dict[str, Any], Flattened({
        "insecure": Refused("the hub's certificate is checked", (False,)),
        **{name: Refused("the hub knows the server by its HF_TOKEN", ("",)) for name in ("username", "password")},
    })]  # fmt: skip


class OllamaDeleteBody(msgspec.Struct, kw_only=True):
    """DELETE /api/delete."""

    model: Annotated[str, Field("one that is not served, or a name that was copied", aliases=_OLDER_NAME)]


class OllamaCopyBody(msgspec.Struct, kw_only=True):
    """POST /api/copy."""

    source: Annotated[str, Field("a served name")]
    destination: Annotated[str, Field("a further name for it, until the server stops")]


CHAT = RequestSchema(OllamaChatBody)
GENERATE = RequestSchema(OllamaGenerateBody)
SHOW = RequestSchema(OllamaShowBody)
PULL = RequestSchema(OllamaPullBody)
DELETE = RequestSchema(OllamaDeleteBody)
COPY = RequestSchema(OllamaCopyBody)
