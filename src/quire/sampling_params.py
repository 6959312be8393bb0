"""`SamplingParams`: how the tokens of one request are sampled, under vLLM's names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from quire.errors import InvalidRequestError, names_unknown_arguments, unknown_name_message
from quire.structured_params import StructuredOutputsParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PATTERN = 256
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_BYTES = 1024
MAX_TOKEN_LIST = 4096
MAX_BAD_WORDS = 256
MAX_SEED = 2**63 - 1
GREEDY_EPSILON = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


class RequestOutputKind(Enum):
    """What each `RequestOutput` of a stream holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the one before."""
    FINAL_ONLY = 2
    """One output, at the end."""


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """What counts as repetition, in tokens: the last of them are one pattern, `min_count` times."""

    max_pattern_size: int = 0
    """Longest pattern; 0 detects nothing."""
    min_pattern_size: int = 0
    """Shortest pattern; 0 is 1."""
    min_count: int = 0
    """At least 2."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InvalidRequestError: a size out of range.
        """
        name = "repetition_detection"
        _whole(0, MAX_PATTERN).check(f"{name}.max_pattern_size", self.max_pattern_size)
        _whole(0, self.max_pattern_size).check(f"{name}.min_pattern_size", self.min_pattern_size)
        _whole(2 if self.max_pattern_size else 0, 2**31 - 1).check(f"{name}.min_count", self.min_count)


@names_unknown_arguments("sampling parameter")
@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Every field is honoured; a value out of range is refused with `InvalidRequestError` naming the field.

    The order in which they act on the logits of one position: `allowed_token_ids`, `logit_bias`,
    `min_tokens` (stop tokens masked), `bad_words`, the three penalties, `typical_p`, `temperature`, `min_p`,
    `top_k`, `top_p`, sampling. `logprobs` are those of the model's own logits, before any of it
    (or these logits: `EngineArgs.logprobs_mode`).
    """

    n: int = 1
    """Sequences to generate for one prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the most probable tokens whose mass reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 (or -1, as older clients send it) keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the best one's; in [0, 1]."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one, up to this mass; in (0, 1]."""
    seed: int | None = None
    """Makes sampling repeat itself. None: the engine's seed and the request's number decide."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens already generated; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token was generated; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) logits of tokens in prompt or output; in [0.001, 2]."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the text."""
    bad_words: Sequence[str] | None = None
    """Words that are never generated."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None: as many as the model's length allows. Where that length ends a sequence
    first, it ends with `length`, as in vLLM; over HTTP a `max_tokens` that cannot fit is refused."""
    min_tokens: int = 0
    """No stop of any kind before this many tokens."""
    logprobs: int | None = None
    """Log-probabilities of this many best tokens beside the chosen one's."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logprob_token_ids: Sequence[int] | None = None
    """With `logprobs`: those of these tokens, beside the chosen one's, instead of the best."""
    repetition_detection: RepetitionDetectionParams | None = None
    """End a sequence that repeats itself, with `finish_reason` repetition. A mapping of its fields will do."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these tokens; values in [-100, 100]."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these may be generated."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the answer is held to: a JSON Schema, a regular expression, a choice, a grammar. A mapping of them
    will do. Answers end where they are complete."""
    detokenize: bool = True
    """Make text; False leaves `text` empty."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Put spaces between adjacent special tokens when they are shown."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or the stop token's text) at the end of the text."""
    output_kind: RequestOutputKind = field(default=RequestOutputKind.CUMULATIVE)
    """What a stream yields."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidRequestError: a value of a wrong type or out of range, named.
        """
        for name, allowed in RANGES.items():
            setattr(self, name, allowed.check(name, getattr(self, name)))
        for name in FLAGS:
            if type(getattr(self, name)) is not bool:
                raise _bad(name, "must be true or false")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _bad("output_kind", "must be a RequestOutputKind")
        self.stop = _strings("stop", self.stop, MAX_STOP_STRINGS)
        self.bad_words = _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _bad("allowed_token_ids", "must not be empty; leave it out to allow every token")
        self.logprob_token_ids = _token_ids("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS)
        self.repetition_detection = _repetition(self.repetition_detection)
        self.logit_bias = _bias(self.logit_bias)
        if self.structured_outputs is not None:
            self.structured_outputs = StructuredOutputsParams.from_mapping(self.structured_outputs)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", f"must not exceed max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.logprob_token_ids and self.logprobs is None:
            raise _bad("logprob_token_ids", "needs logprobs")
        if self.stop and not self.detokenize:
            raise _bad("stop", "needs detokenize=True: stop strings are found in text")
        if self.structured_outputs is not None and self.ignore_eos:
            raise _bad("ignore_eos", "excludes structured_outputs: nothing may follow a complete answer")
        if self.temperature < GREEDY_EPSILON:
            self.temperature = 0.0
        self.top_k = max(self.top_k, 0)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from names that came from outside.

        Raises:
            InvalidRequestError: an unknown name (with the nearest known one) or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidRequestError(unknown_name_message("sampling parameter", name, known), param=name)
        return cls(**values)


def _bad(name: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {text}", param=name)


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a number may have: also the source of the API's schema and of the page of limits."""

    low: float
    high: float
    is_whole: bool = False
    is_optional: bool = False
    is_above_low: bool = False
    """`low` itself is excluded."""

    def check(self, name: str, value: Any) -> Any:
        """`value`, a float where it may be one.

        Raises:
            InvalidRequestError: a wrong type, or outside.
        """
        if value is None and self.is_optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            found = value if isinstance(value, float) else type(value).__name__
            raise _bad(name, f"must be a {'whole ' * self.is_whole}number, got {found}")
        inside = self.low < value <= self.high if self.is_above_low else self.low <= value <= self.high
        if self.is_whole:
            if not inside:
                raise _bad(name, f"must be between {self.low} and {self.high}, got {value}")
            return value
        if not inside or not math.isfinite(value):
            edge = "(" if self.is_above_low else "["
            raise _bad(name, f"must be in {edge}{self.low:g}, {self.high:g}], got {value}")
        return float(value)


def _whole(low: int, high: int, *, optional: bool = False) -> Range:
    return Range(low, high, is_whole=True, is_optional=optional)


BIAS = Range(-100.0, 100.0)
LENGTH_PENALTY = Range(-10.0, 10.0)
RANGES = {
    "n": _whole(1, MAX_N),
    "temperature": Range(0.0, 100.0),
    "top_p": Range(0.0, 1.0, is_above_low=True),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": Range(0.0, 1.0),
    "typical_p": Range(0.0, 1.0, is_above_low=True),
    "seed": _whole(-(2**63), MAX_SEED, optional=True),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(0.001, 2.0),  # far enough from 0 that a logit divided by it stays finite
    "max_tokens": _whole(1, 2**31 - 1, optional=True),
    "min_tokens": _whole(0, 2**31 - 1),
    "logprobs": _whole(0, MAX_LOGPROBS, optional=True),
    "prompt_logprobs": _whole(0, MAX_LOGPROBS, optional=True),
}
FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that the model's own generation settings fill where a request leaves them out, as in vLLM."""


def _strings(name: str, value: Any, cap: int) -> list[str]:
    if value is None:
        return []
    items = [value] if isinstance(value, str) else value
    if isinstance(items, bytes | Mapping) or not isinstance(items, Sequence):
        raise _bad(name, "must be a string or a list of strings")
    if len(items) > cap:
        raise _bad(name, f"may hold at most {cap} strings, got {len(items)}")
    for item in items:
        if not isinstance(item, str) or not item:
            raise _bad(name, "must hold strings that are not empty")
        try:
            size = len(item.encode())
        except UnicodeEncodeError as error:
            raise _bad(name, "must hold text that is valid Unicode") from error
        if size > MAX_STOP_STRING_BYTES:
            raise _bad(name, f"may hold strings of at most {MAX_STOP_STRING_BYTES} bytes")
    return list(items)


def _token_id(name: str, item: Any) -> int:
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
        raise _bad(name, "must hold token ids (whole numbers that are not negative)")
    return item


def _token_ids(name: str, value: Any, cap: int = MAX_TOKEN_LIST) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise _bad(name, "must be a list of token ids")
    if len(value) > cap:
        raise _bad(name, f"may hold at most {cap} token ids, got {len(value)}")
    return sorted({_token_id(name, item) for item in value})


def _repetition(value: Any) -> RepetitionDetectionParams | None:
    if value is None or isinstance(value, RepetitionDetectionParams):
        return value
    known = [item.name for item in fields(RepetitionDetectionParams)]
    if not isinstance(value, Mapping) or not all(name in known for name in value):
        raise _bad("repetition_detection", f"must be an object with {', '.join(known)}")
    return RepetitionDetectionParams(**value)


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _bad("logit_bias", "must map token ids to numbers")
    if len(value) > MAX_TOKEN_LIST:
        raise _bad("logit_bias", f"may hold at most {MAX_TOKEN_LIST} tokens, got {len(value)}")
    return {_token_id("logit_bias", key): BIAS.check("logit_bias", item) for key, item in sorted(value.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How many beams, how long, and what length is worth: the names are vLLM's."""

    beam_width: int
    """Sequences that are kept at each step, and answers that are given: 1 to 19."""
    max_tokens: int
    """Of each answer."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    temperature: float = 0.0
    """0: beams are the most probable continuations; none is sampled."""
    length_penalty: float = 1.0
    """A sequence is judged by its log-probability divided by its length to this power."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InvalidRequestError: a value out of range, by its name.
        """
        for name, most in (("beam_width", MAX_LOGPROBS - 1), ("max_tokens", 2**31 - 1)):
            _whole(1, most).check(name, getattr(self, name))
        LENGTH_PENALTY.check("length_penalty", self.length_penalty)
        if type(self.ignore_eos) is not bool:
            raise _bad("ignore_eos", "must be true or false")
        if self.temperature != 0:
            raise _bad("temperature", "must be 0: beams are not sampled")
