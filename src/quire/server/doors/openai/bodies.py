"""The bodies of OpenAI's text API and of vLLM's /tokenize and /detokenize, field by field.

A field that Quire does not honour is let through only with a value that asks for nothing (OpenAI's own default),
because clients send those. Labels (`user`, `metadata`, `prompt_cache_key` ...) are for an operator's records, for what
routes requests to several servers, or about storage and price: they change no text by definition, and are checked for
size and not kept. Where a client may count on what a label asks for, the answer says what was done.
"""

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from quire import sampling_params as sampling
from quire.engine.inputs import MAX_PRIORITY, MAX_SALT_BYTES
from quire.server.answers.fields import sampling_field as _sampling
from quire.server.answers.fields import strings as _strings
from quire.server.doors.openai.conversation import (
    CACHED,
    Conversation,
    Hint,
    SpecialTokens,
    ToolChoice,
    one_of,
)
from quire.server.doors.openai.shapes import SHAPES
from quire.server.http.limits import MAX_TIMEOUT_SECONDS, Limits
from quire.server.http.schema import STRING, Field, Flattened, Refused, RequestSchema, Schema, array, number

TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
REQUEST_ID = r"^[A-Za-z0-9._:\-]{1,64}$(?!\n)"
"""A client's name for its request stands in headers, logs and paths; `$` alone lets a line end follow."""
MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_VALUE = 16, 64, 512
"""Pairs, and characters of their names and values, as at OpenAI."""
MAX_TOKENS = ("max_completion_tokens", "max_new_tokens", "max_output_tokens", "num_predict", "n_predict")

_FUNCTIONS = "it is OpenAI's older name: send tools and tool_choice"
_TEXT_ONLY = "this server reads and writes text only"
_NOT_MODERATED = "nothing is moderated by this server"
_PLAIN = "it is not supported in this version"
_OTHER_SHAPES = ("regex", "ebnf", "grammar", "format", "structural_tag")
"""Other engines' names for what `structured_outputs` holds."""
_REFUSED_MEDIA = Refused(_TEXT_ONLY, ({},))

REFUSED = {
    "json_schema": Refused("use response_format or structured_outputs", aliases=_OTHER_SHAPES),
    "moderation": Refused(_NOT_MODERATED),
    "return_token_offsets": Refused("they belong to vLLM's route that renders prompts; see /tokenize", (False,)),
    "return_weight_versions": Refused("the weights of a server do not change", (False,)),
    "kv_transfer_params": Refused("caches are not moved between servers in this version"),
    "vllm_xargs": Refused("they are for plug-ins of vLLM"),
    "watermarking": Refused(_PLAIN),
}
REFUSED_COMPLETION = {
    "prompt_embeds": Refused(_PLAIN),
    "return_prompt_text": Refused("echo gives the prompt", (False,)),
}
REFUSED_CHAT = {
    "use_beam_search": Refused("beams are for completions", (False,)),
    "length_penalty": Refused("it belongs to beam search, which is for completions", (1.0,)),
    "functions": Refused(_FUNCTIONS, ([],)),
    "function_call": Refused(_FUNCTIONS, ("none", "auto")),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "audio": Refused(_TEXT_ONLY),
    "prediction": Refused(_PLAIN),
    "web_search_options": Refused("this server looks nothing up"),
    "media_io_kwargs": _REFUSED_MEDIA,
    "mm_processor_kwargs": _REFUSED_MEDIA,
}
REFUSED_TOKENIZE = {"mm_processor_kwargs": _REFUSED_MEDIA}


def _repetition() -> Schema:
    sizes: Schema = {"type": "integer", "minimum": 0, "maximum": sampling.MAX_PATTERN}
    properties = {"max_pattern_size": sizes, "min_pattern_size": sizes, "min_count": {"type": "integer", "minimum": 0}}
    return {"type": "object", "properties": properties, "additionalProperties": False}


_TOKEN_LIST = array(TOKEN_ID, sampling.MAX_TOKEN_LIST)
_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": number(sampling.BIAS),
    "maxProperties": sampling.MAX_TOKEN_LIST,
}
SAMPLING = {
    "n": _sampling("n", "sequences to sample for each prompt"),
    "best_of": Field(
        "completions: sequences to sample, of which the n most probable by their mean are given; not with stream. "
        "Chats: n, or 1",
        schema=number(sampling.RANGES["n"]),
    ),
    "temperature": _sampling("temperature", "0 takes the most probable token"),
    "top_p": _sampling("top_p", "keep the most probable tokens up to this mass"),
    "top_k": _sampling("top_k", "keep this many tokens; 0 and -1 keep all"),
    "min_p": _sampling("min_p", "drop tokens less probable than this share of the best one's"),
    "typical_p": _sampling("typical_p", "keep tokens whose surprise is nearest to the expected, up to this mass"),
    "seed": _sampling("seed", "makes sampling repeat", "sampling_seed", "random_seed"),
    "presence_penalty": _sampling("presence_penalty", "against tokens that occurred in the answer"),
    "frequency_penalty": _sampling("frequency_penalty", "against tokens, by how often they occurred in the answer"),
    "repetition_penalty": _sampling("repetition_penalty", "above 1 against tokens of prompt and answer"),
    "stop": Field("strings that end the answer", schema=_strings(sampling.MAX_STOP_STRINGS)),
    "stop_token_ids": Field("tokens that end the answer", schema=_TOKEN_LIST),
    "bad_words": Field("words that are never generated", schema=_strings(sampling.MAX_BAD_WORDS)),
    "ignore_eos": _sampling("ignore_eos", "go on after the model's end-of-sequence token"),
    "min_tokens": _sampling("min_tokens", "no stop of any kind before this many tokens"),
    "prompt_logprobs": _sampling(
        "prompt_logprobs", "log-probabilities of so many best tokens at each place of the prompt; not with stream"
    ),
    "logprob_token_ids": Field(
        "with logprobs: the log-probabilities of these tokens instead of the best",
        schema=array(TOKEN_ID, sampling.MAX_LOGPROB_TOKEN_IDS),
    ),
    "repetition_detection": Field(
        "in tokens: the answer ends with finish_reason repetition when its end is one pattern min_count times",
        schema=_repetition(),
    ),
    "logit_bias": Field("added to the logits of these tokens", schema=_BIAS),
    "allowed_token_ids": Field("only these tokens may be generated", schema={**_TOKEN_LIST, "minItems": 1}),
    "skip_special_tokens": _sampling("skip_special_tokens", "leave special tokens out of the text"),
    "spaces_between_special_tokens": _sampling(
        "spaces_between_special_tokens", "put spaces between adjacent special tokens when they are shown"
    ),
    "include_stop_str_in_output": _sampling("include_stop_str_in_output", "keep the stop string in the text"),
    **SHAPES,
}
_LENGTH = "tokens to generate at most; one that does not fit beside the prompt is refused; -1 is what fits. Left out: "


def _unbounded(least: int) -> Schema:
    return {"anyOf": [{"enum": [-1]}, {**number(sampling.RANGES["max_tokens"]), "minimum": least}]}


COMPLETION_SAMPLING = SAMPLING | {
    "max_tokens": Field(_LENGTH + "16 or what fits. 0 with echo: score it", aliases=MAX_TOKENS, schema=_unbounded(0)),
    "logprobs": _sampling("logprobs", "log-probabilities of so many best tokens"),
}
CHAT_SAMPLING = SAMPLING | {
    "max_tokens": Field(_LENGTH + "what fits, log-probabilities too", aliases=MAX_TOKENS, schema=_unbounded(1)),
    "top_logprobs": _sampling("logprobs", "with logprobs: of so many best tokens beside the chosen one"),
}

Model = Annotated[str | None, Field("one of the served names; left out: the first")]
Label = Annotated[str | None, Field("a label: it changes no answer and is not kept", limit="label_characters")]
_Interval = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
_Salt = Annotated[str, Meta(max_length=MAX_SALT_BYTES)]
_Seconds = Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_SECONDS)]
_Kept = Annotated[int, Meta(ge=-1, le=2**31 - 1, extra_json_schema={"not": {"const": 0}})]
_Pairs = dict[Annotated[str, Meta(max_length=MAX_METADATA_NAME)], Annotated[str, Meta(max_length=MAX_METADATA_VALUE)]]
Metadata = Annotated[_Pairs, Meta(max_length=MAX_METADATA)]
METADATA = (
    f"be an object of at most {MAX_METADATA} texts, of at most {MAX_METADATA_VALUE} characters, under names of at most "
    f"{MAX_METADATA_NAME}"
)
_Tier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
_Retention = Literal["in_memory", "in-memory", "24h"]
_Budget = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Never = Annotated[bool, Meta(extra_json_schema={"enum": [False]})]


class Labels(msgspec.Struct, kw_only=True):
    """What every body may carry."""

    user: Label = None
    safety_identifier: Label = None
    session_id: Label = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream holds beside the answer."""

    include_usage: Annotated[bool | None, Field("a last event with the usage")] = None
    continuous_usage_stats: Annotated[bool | None, Field("usage so far in every event")] = None
    include_obfuscation: Annotated[_Never | None, Field("nothing is obfuscated here")] = None


class AnswerOptions(Labels, kw_only=True):
    """How an answer is computed and sent, whichever route it is of."""

    model: Model = None
    stream: Annotated[bool, Field("send the answer as it comes, as server-sent events")] = False
    stream_interval: Annotated[
        _Interval,
        Field(
            "tokens of a sequence in one event of a stream; its first token and its end are sent at once",
            "be a whole number from 1 to 2147483647",
        ),
    ] = 1
    priority: Annotated[
        _Priority, Field("with --scheduling-policy priority: lower first", f"be a whole number within {MAX_PRIORITY}")
    ] = 0
    cache_salt: Annotated[
        _Salt,
        Field("requests with the same one share a prefix cache", f"be a string of at most {MAX_SALT_BYTES} bytes"),
    ] = ""
    timeout: Annotated[
        _Seconds | None,
        Field(
            "seconds to the end of the answer, in the queue and while it runs; then 408. The header X-Request-Timeout "
            "says the same; the shorter holds",
            f"be in (0, {MAX_TIMEOUT_SECONDS}] seconds",
        ),
    ] = None
    service_tier: Annotated[
        _Tier | None, Field("a label: there is one tier, and the answer names it (default)", one_of(_Tier))
    ] = None
    prompt_cache_key: Annotated[
        str | None, Field("a label: prefixes are cached by their content; see cache_salt", limit="label_characters")
    ] = None
    prompt_cache_retention: Annotated[_Retention | None, Field(CACHED, one_of(_Retention))] = None
    prompt_cache_options: Hint = None


class ResponseOptions(AnswerOptions, kw_only=True):
    """What travels beside the sampling parameters of completions and chats."""

    stream_options: Annotated[StreamOptions | None, Field("with stream: what it holds more", "be an object")] = None
    truncate_prompt_tokens: Annotated[
        _Kept | None,
        Field(
            "keep so many of the prompt's tokens; -1 keeps what leaves room for max_tokens",
            "be a whole number above 0, or -1 for what fits",
        ),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Field("the end of the prompt that is cut: left unless set", "be left or right")
    ] = None
    return_token_ids: Annotated[bool, Field("token_ids of each choice, and prompt_token_ids")] = False
    return_tokens_as_token_ids: Annotated[
        bool, Field("logprobs name tokens token_id:N, which is exact where texts of tokens are not")
    ] = False
    request_id: Annotated[
        Annotated[str, Meta(pattern=REQUEST_ID)] | None,
        Field(
            "the answer's id becomes chatcmpl- (cmpl-) and this; refused while another request of the same key has it",
            "be 1 to 64 letters, digits and any of . _ : -",
        ),
    ] = None
    store: Annotated[bool, Field("a label: nothing is stored, and the answer says so (store: false)")] = False
    metadata: Annotated[
        Metadata | None,
        Field(
            "labels: they change no answer and are not kept",
            METADATA,
        ),
    ] = None

    @property
    def include_usage(self) -> bool:
        """Whether a last event of a stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats is True


def _prompts(limits: Limits) -> Schema:
    ids = array(TOKEN_ID, least=1)
    return {"anyOf": [STRING, ids, array({"anyOf": [STRING, ids]}, limits.prompts.value, least=1)]}


class CompletionBody(msgspec.Struct, kw_only=True):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[int | str | list[int]],
        Field(
            "a text, texts, token ids, or lists of token ids",
            "be a string, a list of strings, a list of token ids or a list of token-id lists, not empty",
            schema=_prompts,
        ),
    ]
    suffix: Annotated[
        str,
        Field("what stands behind the answer, for models whose tokenizer knows filling in the middle; not with echo"),
    ] = ""
    echo: Annotated[bool, Field("the prompt before the answer; with max_tokens 0 the prompt alone")] = False
    use_beam_search: Annotated[
        bool, Field("the n most probable answers that n beams find, best first; with no other field of sampling")
    ] = False
    length_penalty: Annotated[
        Annotated[float, Meta(ge=sampling.LENGTH_PENALTY.low, le=sampling.LENGTH_PENALTY.high)],
        Field(
            "with use_beam_search: answers are judged by their log-probability by their length to this power",
            "be a number from -10 to 10",
        ),
    ] = 1.0
    add_special_tokens: SpecialTokens = True
    options: Annotated[ResponseOptions, Flattened()]
    sampling: Annotated[dict[str, Any], Flattened(COMPLETION_SAMPLING | REFUSED | REFUSED_COMPLETION)]


class ChatBody(msgspec.Struct, kw_only=True):
    """POST /v1/chat/completions."""

    conversation: Annotated[Conversation, Flattened()]
    options: Annotated[ResponseOptions, Flattened()]
    sampling: Annotated[dict[str, Any], Flattened(CHAT_SAMPLING | REFUSED | REFUSED_CHAT)]
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ToolChoice,
        Field(
            "whether tools are called: none, auto (the model decides; so it is with tools), required, one of them, or "
            "allowed_tools",
            "be none, auto, required, or an object that names a function or allowed_tools",
        ),
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Field("an answer may hold several calls")] = True
    include_reasoning: Annotated[bool, Field("the answer holds the reasoning; false: it is left out")] = True
    thinking_token_budget: Annotated[
        _Budget | None, Field("tokens of reasoning at most; then it is closed", "be a whole number of at least 0")
    ] = None
    logprobs: Annotated[bool, Field("log-probabilities of the answer's tokens")] = False
    echo: Annotated[bool, Field("a last message of the assistant before what goes on from it")] = False
    return_prompt_text: Annotated[bool, Field("prompt_text: the prompt as the model read it")] = False


class TokenizeOptions(Labels, kw_only=True):
    """What both forms of /tokenize take."""

    model: Model = None
    return_token_strs: Annotated[bool, Field("the text of each token too")] = False


class TokenizeTextBody(msgspec.Struct, kw_only=True):
    """POST /tokenize with a text."""

    prompt: Annotated[str, Field("the text", "be a string, or there must be messages")]
    add_special_tokens: SpecialTokens = True
    options: Annotated[TokenizeOptions, Flattened()]


class TokenizeChatBody(msgspec.Struct, kw_only=True):
    """POST /tokenize with a conversation."""

    conversation: Annotated[Conversation, Flattened()]
    options: Annotated[TokenizeOptions, Flattened()]
    refused: Annotated[dict[str, Any], Flattened(REFUSED_TOKENIZE)]


class DetokenizeBody(Labels, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[
        list[Annotated[int, Meta(ge=0, le=2**31 - 1)]],
        Field("the tokens", "be a list of token ids", limit="detokenized_tokens"),
    ]
    model: Model = None


COMPLETION = RequestSchema(CompletionBody)
CHAT = RequestSchema(ChatBody)
TOKENIZE_TEXT = RequestSchema(TokenizeTextBody)
TOKENIZE_CHAT = RequestSchema(TokenizeChatBody)
DETOKENIZE = RequestSchema(DetokenizeBody)


def request_bodies(limits: Limits) -> dict[str, Schema]:
    """The schema of each body and of what it is made of, by its name in the API's description."""
    found: dict[str, Schema] = {}
    bodies = {"CompletionRequest": COMPLETION, "ChatCompletionRequest": CHAT, "DetokenizeRequest": DETOKENIZE}
    for name, schema in (*bodies.items(), ("TokenizeText", TOKENIZE_TEXT), ("TokenizeChat", TOKENIZE_CHAT)):
        found[name], below = cast(RequestSchema[Any], schema).json_schema(limits)
        found |= below
    found["TokenizeRequest"] = {"anyOf": [found.pop("TokenizeText"), found.pop("TokenizeChat")]}
    return found
