"""Prompts and parameters in, checked `NewRequest`s out: the one validator behind every API."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from quire.core.request import GrammarSpec, NewRequest, PenaltySpec, SamplingSpec
from quire.engine.queue import ANYBODY, Caller
from quire.errors import InvalidRequestError, PromptTooLongError, context_length_message
from quire.sampling_params import SamplingParams
from quire.structured_params import StructuredOutputsParams
from quire.text.fill_in import encode_gap
from quire.text.tokenizer import Tokenizer

MAX_PRIORITY = 2**31 - 1
MAX_SALT_BYTES = 256
MAX_ID_BYTES = 1024

BYTES = bytes | bytearray | memoryview
"""Sequences of whole numbers, and no prompt."""
BadWords = tuple[tuple[int, ...], ...]
"""The tokens of each."""
Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, `{"prompt": text}`, `{"prompt_token_ids": ids}` or token ids."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request is checked against."""

    max_model_len: int
    vocab_size: int
    """Width of the logits: every token id is below it."""
    eos_token_ids: tuple[int, ...]
    seed: int
    has_priorities: bool
    """False when the policy serves in order of arrival: then no request may bring a priority."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request of `n` sequences: what the core gets, and what the text side keeps."""

    number: int
    """Unique in this engine; made here, never by a client."""
    request_id: str
    """The client's name for it, or ours when it gave none: only shown, never looked up."""
    prompt: str | None
    params: SamplingParams
    sequences: tuple[NewRequest, ...]


class Shapes(Protocol):
    """Compiles shapes; see `quire.structured.checker`."""

    def source(self, params: StructuredOutputsParams) -> str:
        """The grammar, or `InvalidRequestError`."""

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether `source` answers at once."""


class InputProcessor:
    """Tokenises and checks. Numbers requests, so that each has an id and a seed that no client chose."""

    def __init__(self, tokenizer: Tokenizer | None, limits: RequestLimits, shapes: Shapes | None = None) -> None:
        self._tokenizer = tokenizer
        self._shapes = shapes
        self._limits = limits
        self._numbers = itertools.count()

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Within it, a refused request takes back the numbers of those before it, so that later requests have the seeds
        that they would have had. For one caller alone, and nothing of it may be in the engine yet."""
        first = next(self._numbers)
        self._numbers = itertools.count(first)
        try:
            yield
        except BaseException:
            self._numbers = itertools.count(first)
            raise

    def parse(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        arrival_s: float = 0.0,
        caller: Caller = ANYBODY,
        bad_words: BadWords | None = None,
        is_background: bool = False,
    ) -> ParsedRequest:
        """Check everything about a request.

        Args:
            bad_words: those of `params`, where they are encoded already.
            is_background: it is computed while no other request runs.

        Raises:
            InvalidRequestError: naming the field; PromptTooLongError: with the numbers.
        """
        text, token_ids = self.tokenize(prompt)
        if not token_ids:
            raise InvalidRequestError("prompt must hold at least one token", param="prompt")
        room = self._limits.max_model_len - len(token_ids)
        if room < max(1, params.min_tokens):
            raise self._too_long(len(token_ids), params, room)
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise InvalidRequestError(f"priority must be a whole number within {MAX_PRIORITY}", param="priority")
        if priority and not self._limits.has_priorities:
            raise InvalidRequestError("priority needs scheduling_policy='priority'; this is 'fcfs'", param="priority")
        _utf8_size("cache_salt", cache_salt, MAX_SALT_BYTES)
        _utf8_size("request_id", request_id or "", MAX_ID_BYTES)
        if params.detokenize and self._tokenizer is None:
            raise InvalidRequestError("detokenize must be false: this model has no tokenizer", param="detokenize")
        number = next(self._numbers)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        words = self.encode_bad_words(params) if bad_words is None else bad_words
        spec = self._sampling_spec(params, number, max_tokens, words)
        sequences = tuple(
            NewRequest(
                request_id=str(number) if params.n == 1 else f"{number}.{index}",
                prompt_token_ids=token_ids,
                max_tokens=max_tokens,
                sampling=spec._replace(seed=(spec.seed + index) % 2**64) if index else spec,
                eos_token_ids=() if params.ignore_eos else self._limits.eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
                arrival_s=arrival_s,
                caller=caller.name,
                caller_weight=caller.weight,
                needs_output_tokens=spec.needs_output_tokens,
                is_background=is_background,
            )
            for index in range(params.n)
        )
        return ParsedRequest(number, request_id or str(number), text, params, sequences)

    def tokenize(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """The prompt's text, if it has one, and its token ids.

        Raises:
            InvalidRequestError: neither text nor token ids of this model. PromptTooLongError: too many bytes.
        """
        bare = _prompt_of_mapping(prompt) if isinstance(prompt, Mapping) else prompt
        if isinstance(bare, str):
            return bare, tuple(self.encode(bare))
        if isinstance(bare, BYTES) or not isinstance(bare, Sequence):
            raise InvalidRequestError("prompt must be text or a list of token ids", param="prompt")
        self.check_token_ids("prompt_token_ids", bare)
        return None, tuple(cast(Sequence[int], bare))

    def check_token_ids(self, field: str, token_ids: Sequence[Any]) -> None:
        """Check that every id is a whole number below the width of the logits.

        Raises:
            InvalidRequestError: naming `field`.
        """
        vocab_size = self._limits.vocab_size
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
            return  # a long list costs little so; what follows finds the one to name
        for item in token_ids:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise InvalidRequestError(
                    f"{field} must hold token ids from 0 to {vocab_size - 1}, got {str(item)[:40]!r}",
                    param=field,
                )

    def _too_long(self, num_tokens: int, params: SamplingParams, room: int) -> PromptTooLongError:
        most = self._limits.max_model_len
        if room < 1:
            asked, param = params.max_tokens or 1, "prompt"
            hint = f"With one token of output a prompt of at most {most - 1} fits (max_model_len is {most})."
        else:
            asked, param = params.min_tokens, "min_tokens"
            hint = f"min_tokens may be at most {room} after this prompt (max_model_len is {most})."
        return PromptTooLongError(context_length_message(most, num_tokens, asked, hint), param=param)

    def encode(self, text: str, *, add_special_tokens: bool = True, suffix: str = "") -> list[int]:
        """Token ids of a text, each below the width of the logits.

        Args:
            suffix: stands behind the gap that the answer fills.

        Raises:
            InvalidRequestError: no text of this model. PromptTooLongError: too many bytes.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: send prompt_token_ids", param="prompt")
        self.check_text_size(text + suffix)
        if suffix:
            token_ids = encode_gap(self._tokenizer, text, suffix, add_special_tokens=add_special_tokens)
        else:
            token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self.check_encoded(token_ids, "prompt")
        return token_ids

    def check_encoded(self, token_ids: Sequence[int], field: str) -> None:
        """Check tokens that a text gave: a tokenizer may know more of them than the model.

        Raises:
            InvalidRequestError: naming `field`.
        """
        largest = max(token_ids, default=0)
        if largest >= self._limits.vocab_size and self._tokenizer is not None:
            content = self._tokenizer.token_text(largest)[:40]
            raise InvalidRequestError(
                f"{field} holds {content!r}, which is token {largest} of the tokenizer; the model's own end at "
                f"{self._limits.vocab_size - 1}",
                param=field,
            )

    def check_text_size(self, text: str) -> None:
        """Refuse text, before the work of tokenising it, that has too many bytes for any tokenisation to fit.

        Raises:
            InvalidRequestError: not valid Unicode. PromptTooLongError: too many bytes.
        """
        size = _utf8_size("prompt", text)
        max_model_len = self._limits.max_model_len
        if size <= max_model_len or self._tokenizer is None:
            return  # a token has a byte at least; how many it can have takes a look at the whole vocabulary
        largest = self._tokenizer.max_token_bytes
        if largest is not None and size > max_model_len * largest:
            raise PromptTooLongError(
                f"This model's maximum context length is {max_model_len} tokens. However, the prompt has {size} bytes, "
                f"and at most {max_model_len * largest} can fit. Please reduce the length of the messages.",
                param="prompt",
            )

    def _sampling_spec(self, params: SamplingParams, number: int, max_tokens: int, bad_words: BadWords) -> SamplingSpec:
        for field in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            self.check_token_ids(field, list(getattr(params, field) or ()))
        eos = () if params.ignore_eos else self._limits.eos_token_ids
        stop_token_ids = tuple(sorted({*(params.stop_token_ids or ()), *eos}))
        excluded = {word[0] for word in bad_words if len(word) == 1} | set(stop_token_ids if params.min_tokens else ())
        if params.allowed_token_ids and excluded.issuperset(params.allowed_token_ids):
            raise InvalidRequestError(
                "allowed_token_ids leaves no token to begin with: bad_words or min_tokens exclude all of them",
                param="allowed_token_ids",
            )
        source = self.grammar_source(params)
        return SamplingSpec(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=min(params.top_k, self._limits.vocab_size),
            min_p=params.min_p,
            seed=_mixed(self._limits.seed, number) if params.seed is None else params.seed % 2**64,
            penalties=PenaltySpec(params.presence_penalty, params.frequency_penalty, params.repetition_penalty),
            min_tokens=params.min_tokens,
            stop_token_ids=stop_token_ids,
            logit_bias=tuple(sorted((params.logit_bias or {}).items())),
            allowed_token_ids=tuple(params.allowed_token_ids or ()),
            bad_words=bad_words,
            num_logprobs=params.logprobs,
            num_prompt_logprobs=params.prompt_logprobs,
            logprob_token_ids=tuple(params.logprob_token_ids or ()),
            grammar=None if source is None else GrammarSpec(source, max_tokens),
            typical_p=params.typical_p,
        )

    def grammar_source(self, params: SamplingParams) -> str | None:
        """The grammar that answers are held to; None: to none.

        Raises:
            InvalidRequestError: it does not compile, or this model or installation can hold no answer.
        """
        shape = params.structured_outputs
        if shape is None:
            return None
        if self._shapes is None or self._tokenizer is None or not self._limits.eos_token_ids:
            lacks = (
                "installation lacks quire.structured" if self._shapes is None else "model has no tokenizer, or no end"
            )
            raise InvalidRequestError(f"structured_outputs: this {lacks}", param="structured_outputs")
        return self._shapes.source(shape)

    def knows_shape(self, params: SamplingParams) -> bool:
        """Whether `grammar_source` answers at once."""
        shape = params.structured_outputs
        return shape is None or self._shapes is None or self._shapes.knows(shape)

    def encode_bad_words(self, params: SamplingParams) -> BadWords:
        """Each word as it stands at the start of a text, and as it stands after a space.

        Raises:
            InvalidRequestError: there are some, and the model has no tokenizer.
        """
        if not params.bad_words:
            return ()
        if self._tokenizer is None:
            raise InvalidRequestError("bad_words needs a tokenizer, and this model has none", param="bad_words")
        found: set[tuple[int, ...]] = set()
        for word in params.bad_words:
            bare = word.lstrip()
            for text in (bare, " " + bare):
                found.add(tuple(self._tokenizer.encode(text, add_special_tokens=False)))
        # A word with a token that the model does not have is never generated.
        return tuple(sorted(item for item in found if item and max(item) < self._limits.vocab_size))


def _prompt_of_mapping(prompt: Mapping[str, Any]) -> str | Sequence[int]:
    known = {"prompt", "prompt_token_ids"}
    extra = sorted(str(key) for key in set(prompt) - known)
    if extra:
        raise InvalidRequestError(
            f"a prompt has no field {extra[0]!r}; known: prompt, prompt_token_ids", param="prompt"
        )
    if prompt.get("prompt_token_ids") is not None:
        token_ids = prompt["prompt_token_ids"]
        if isinstance(token_ids, str | Mapping | BYTES) or not isinstance(token_ids, Sequence):
            raise InvalidRequestError("prompt_token_ids must be a list of token ids", param="prompt_token_ids")
        return token_ids
    if not isinstance(prompt.get("prompt"), str):
        raise InvalidRequestError("prompt must be text", param="prompt")
    text: str = prompt["prompt"]
    return text


def _mixed(seed: int, number: int) -> int:
    """A seed for a request that brought none: splitmix64's finaliser over the engine's seed and the request's
    number (Steele, Lea, Flood, OOPSLA 2014), so that a program gives the same answers on every run."""
    value = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def _utf8_size(field: str, value: Any, at_most: float = math.inf) -> int:
    """Bytes of what travels to the core, to logs and to traces, and must be valid Unicode for that."""
    try:
        size = len(value.encode())
    except (AttributeError, UnicodeEncodeError) as error:
        raise InvalidRequestError(f"{field} must be text that is valid Unicode", param=field) from error
    if size > at_most:
        raise InvalidRequestError(f"{field} must be text of at most {at_most} bytes", param=field)
    return size
