"""What a program writes into a conversation: texts, and places that the model fills."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quire.errors import InvalidRequestError, unknown_name_message
from quire.sampling_params import SamplingParams

MAX_TOKENS = 256
"""Of a `gen` that names no other bound."""
MAX_OPTIONS = 128
"""Of one `select`; as many log-probabilities of named tokens as one request may ask for."""
SHAPES = {"regex": "regex", "json": "json", "choices": "choice", "grammar": "grammar"}
"""A keyword of `gen` -> the kind of `StructuredOutputsParams`."""
NOT_HERE = frozenset("n detokenize logprobs prompt_logprobs logprob_token_ids output_kind".split())
"""Of `SamplingParams`: a variable is one text."""


@dataclass(frozen=True, slots=True)
class Gen:
    """A place that is generated. `given` are fields of `SamplingParams`, and no others than were given."""

    name: str
    given: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Select:
    """A place that holds the most likely of some texts."""

    name: str
    options: tuple[str, ...]


Piece = str | Gen | Select


@dataclass(frozen=True, slots=True)
class Pieces:
    """Texts and places in a row; `+` joins them."""

    items: tuple[Piece, ...]

    def __add__(self, other: "str | Pieces") -> "Pieces":
        return joined(self, other)

    def __radd__(self, other: str) -> "Pieces":
        return joined(other, self)


@dataclass(frozen=True, slots=True)
class Turn:
    """A whole turn of a conversation."""

    role: str
    pieces: Pieces


def joined(*parts: Any) -> Pieces:
    """Texts and places in a row.

    Raises:
        InvalidRequestError: something else among them.
    """
    items: list[Piece] = []
    for part in parts:
        if not isinstance(part, str | Pieces):
            text = f"a program writes text, gen and select, not {type(part).__name__}"
            raise InvalidRequestError(text, param="program")
        items += [part] if isinstance(part, str) else part.items
    return Pieces(tuple(items))


def system(*parts: str | Pieces) -> Turn:
    """A turn of the system."""
    return Turn("system", joined(*parts))


def user(*parts: str | Pieces) -> Turn:
    """A turn of the user."""
    return Turn("user", joined(*parts))


def assistant(*parts: str | Pieces) -> Turn:
    """A turn of the assistant: texts that the program says for it, and `gen` and `select` between them."""
    return Turn("assistant", joined(*parts))


def gen(
    name: str,
    *,
    max_tokens: int | None = MAX_TOKENS,
    stop: str | Sequence[str] | None = None,
    temperature: float | None = None,
    regex: str | None = None,
    json: Any = None,
    choices: Any = None,
    grammar: str | None = None,
    **sampling: Any,
) -> Pieces:
    """A place that the model fills: `state[name]` is its text.

    Args:
        name: of the variable.
        max_tokens: at most, 256 unless told; None: as many as fit.
        stop: strings that end it, and are left out.
        temperature: None: the model's own; so are other fields that are left out.
        regex, json, choices, grammar: what it is held to, as in `StructuredOutputsParams`; one of them.
        sampling: further fields of `SamplingParams`.

    Raises:
        InvalidRequestError: naming the variable and the field.
    """
    name = checked_name("gen", name)
    kinds = {"regex": regex, "json": json, "choices": choices, "grammar": grammar}
    held = {SHAPES[kind]: value for kind, value in kinds.items() if value is not None}
    given = {"max_tokens": max_tokens, "stop": stop, "temperature": temperature, **sampling}
    given = {field: value for field, value in given.items() if value is not None or field == "max_tokens"}
    if held:
        if "structured_outputs" in given:
            raise InvalidRequestError(f"gen({name!r}): structured_outputs excludes {next(iter(held))}", param=name)
        given["structured_outputs"] = held
    known = [item.name for item in fields(SamplingParams) if item.name not in NOT_HERE]
    for field in given:
        if field in NOT_HERE:
            raise InvalidRequestError(f"gen({name!r}): {field} does not go with programs", param=name)
        if field not in known:
            text = unknown_name_message("sampling parameter", field, [*known, *SHAPES])
            raise InvalidRequestError(f"gen({name!r}): {text}", param=name)
    try:
        params = SamplingParams(**given)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"gen({name!r}): {error.message}", param=name) from error
    # As they were checked: lists are copies, and a shape is its text.
    return Pieces((Gen(name, {field: getattr(params, field) for field in given}),))


def select(name: str, options: Sequence[str]) -> Pieces:
    """A place for the most likely of some texts: `state[name]` is that text, `state.call(name).scores` has all.

    An option's score is the mean log-probability of its tokens after what stands before it, as
    `quire.programs.scoring` has it; of equal ones the first is taken.

    Raises:
        InvalidRequestError: naming the variable.
    """
    name = checked_name("select", name)
    if isinstance(options, str) or not isinstance(options, Sequence) or not all(isinstance(o, str) for o in options):
        raise InvalidRequestError(f"select({name!r}): options must be a list of texts", param=name)
    if not 1 <= len(options) <= MAX_OPTIONS:
        text = f"select({name!r}): options must be 1 to {MAX_OPTIONS} texts, got {len(options)}"
        raise InvalidRequestError(text, param=name)
    for place, option in enumerate(options):
        if not option or option[0] == "\x01" or option in options[:place]:
            what = "twice" if option in options[:place] else "as an option"
            raise InvalidRequestError(f"select({name!r}): options hold {option!r} {what}", param=name)
    return Pieces((Select(name, tuple(options)),))


def checked_name(kind: str, name: Any) -> str:
    """The name of a variable.

    Raises:
        InvalidRequestError: it is no text, or empty.
    """
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{kind} needs the name of a variable, got {name!r:.40}", param="name")
    return name
