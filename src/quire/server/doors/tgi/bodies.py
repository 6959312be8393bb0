"""The bodies of TGI's API, field by field.

Facts: the types of its router and its own description, of its last release (3.3).
"""

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from quire import sampling_params as sampling
from quire.sampling_params import RANGES, Range
from quire.server.http.limits import Limits
from quire.server.http.schema import Field, Refused, RequestSchema, Schema, array

MAX_SEED = 2**64 - 1
MOST_NEW_TOKENS = 1024
"""Of an answer whose length the request leaves open, as in TGI, where more would fit."""
GRAMMARS = Literal["json", "regex", "json_schema"]

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Sequences = Annotated[int, Meta(ge=1, le=sampling.MAX_N)]
_Top = Annotated[int, Meta(ge=0, le=sampling.MAX_LOGPROBS)]
_Seed = Annotated[int, Meta(ge=0)]
_Stop = Annotated[str, Meta(min_length=1)]


def _within(allowed: Range) -> str:
    return f"be a number {'above' if allowed.is_above_low else 'from'} {allowed.low:g} to {allowed.high:g}"


_Temperature = Annotated[float, Meta(gt=0.0, le=RANGES["temperature"].high)]
_Share = Annotated[float, Meta(gt=0.0, le=1.0)]
_Frequency = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Repetition = Annotated[float, Meta(ge=RANGES["repetition_penalty"].low, le=RANGES["repetition_penalty"].high)]
_SHARE = "be a number above 0 to 1"


class Grammar(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer is held to."""

    type: Annotated[GRAMMARS, Field("the kind", "be json, regex or json_schema")]
    value: Annotated[
        dict[str, Any] | str,
        Field(
            "a JSON schema, as an object or text (json); a regular expression (regex); an object with schema and maybe "
            "name (json_schema)",
            "be an object or a string",
        ),
    ]


class Parameters(msgspec.Struct, kw_only=True):
    """`parameters` of a body."""

    max_new_tokens: Annotated[
        _Count | None,
        Field(
            "tokens to generate at most; one that does not fit behind the prompt is refused. Left out: what fits, at "
            f"most {MOST_NEW_TOKENS:,}",
            "be a whole number of at least 1",
        ),
    ] = None
    temperature: Annotated[
        _Temperature | None, Field("1 unless set; any other samples", f"be a number above 0 to {100:g}")
    ] = None
    do_sample: Annotated[
        bool | None,
        Field("sample, also without a temperature, top_k, top_p or typical_p; else the best token is taken"),
    ] = None
    seed: Annotated[
        _Seed | None,
        Field(
            "makes sampling repeat; left out: one is drawn, and details say which",
            f"be a whole number from 0 to {MAX_SEED}",
            schema={"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        ),
    ] = None
    top_k: Annotated[_Count | None, Field("keep this many tokens", "be a whole number of at least 1")] = None
    top_p: Annotated[_Share | None, Field("keep the most probable tokens up to this mass", _SHARE)] = None
    typical_p: Annotated[
        _Share | None, Field("keep the tokens whose surprise is nearest to the expected one, up to this mass", _SHARE)
    ] = None
    repetition_penalty: Annotated[
        _Repetition | None,
        Field("above 1 against tokens of prompt and answer", _within(RANGES["repetition_penalty"])),
    ] = None
    frequency_penalty: Annotated[
        _Frequency | None,
        Field("against tokens, by how often they occurred in the answer", _within(RANGES["frequency_penalty"])),
    ] = None
    stop: Annotated[
        list[_Stop] | None,
        Field(
            "strings that end the answer, which keeps the one that did",
            f"be a list of at most {sampling.MAX_STOP_STRINGS} strings that are not empty",
            aliases=("stop_sequences",),
            schema=array(
                {"type": "string", "minLength": 1, "maxLength": sampling.MAX_STOP_STRING_BYTES},
                sampling.MAX_STOP_STRINGS,
            ),
        ),
    ] = None
    return_full_text: Annotated[
        bool | None, Field("the prompt before the answer; left out: at POST / alone, as in TGI")
    ] = None
    truncate: Annotated[
        _Count | None, Field("keep so many of the prompt's last tokens", "be a whole number of at least 1")
    ] = None
    details: Annotated[bool | None, Field("tokens, their log-probabilities, the seed, why it ended")] = None
    decoder_input_details: Annotated[
        bool | None, Field("details, and the log-probabilities of the prompt; not with stream")
    ] = None
    top_n_tokens: Annotated[
        _Top | None,
        Field(
            "with details: so many best tokens at each place",
            f"be a whole number from 0 to {sampling.MAX_LOGPROBS}",
        ),
    ] = None
    best_of: Annotated[
        _Sequences | None,
        Field(
            "sequences to sample, of which the most probable one by its mean is the answer; not with seed or stream",
            f"be a whole number from 1 to {sampling.MAX_N}",
        ),
    ] = None
    grammar: Annotated[Grammar | None, Field("what the answer is held to", "be an object with type and value")] = None
    watermark: Annotated[Any, Refused("answers are not watermarked by this server", (False,))] = None
    adapter_id: Annotated[Any, Refused("adapters are not served in this version")] = None


PARAMETERS = RequestSchema(Parameters)


def _parameters(limits: Limits) -> Schema:
    return PARAMETERS.json_schema(limits)[0]


Inputs = Annotated[Annotated[str, Meta(min_length=1)], Field("the prompt", "be a string that is not empty")]


class GenerateBody(msgspec.Struct, kw_only=True):
    """POST /generate, /generate_stream and /."""

    inputs: Inputs
    parameters: Annotated[dict[str, Any], Field("how", "be an object", schema=_parameters)] = {}
    stream: Annotated[bool, Field("at POST /: send the answer as it comes; the other routes say it by their name")] = (
        False
    )


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize in TGI's form, which `inputs` makes it."""

    inputs: Inputs
    parameters: Annotated[Any, Refused("they are for generating", ({},))] = None
    stream: Annotated[Any, Refused("tokens come in one piece", (False,))] = None


GENERATE = RequestSchema(GenerateBody)
TOKENIZE = RequestSchema(TokenizeBody)


def request_bodies(limits: Limits) -> dict[str, Schema]:
    """The schema of each body and of what it is made of, by its name in the API's description."""
    found: dict[str, Schema] = {}
    for name, schema in {"GenerateRequest": GENERATE, "TgiTokenizeRequest": TOKENIZE}.items():
        found[name], below = cast(RequestSchema[Any], schema).json_schema(limits)
        found |= below
    return found | PARAMETERS.json_schema(limits)[1]
