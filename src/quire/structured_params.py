"""`StructuredOutputsParams`: the shape that an answer is held to, under vLLM's names."""

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from quire.errors import InvalidRequestError, unknown_name_message

FIELD = "structured_outputs"
MAX_SOURCE_BYTES = 2**18
"""Of a schema, a regular expression, a grammar, or all choices together."""
MAX_NESTING = 64
"""Objects and arrays inside one another in a schema."""
MAX_CHOICES = 1024
MAX_PATTERN_BYTES = 256
"""Of `whitespace_pattern`."""
MAX_RAW_LENGTH = 2000
"""The longest bound on the length of a text that is written as it is, and not as JSON."""
_RAW = frozenset(("type", "description", "title", "default", "examples", "enum", "const", "minLength", "maxLength"))
KINDS = ("json", "yaml", "regex", "choice", "grammar", "structural_tag", "json_object")


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """What every answer must be, exactly one of `json`, `yaml`, `regex`, `choice`, `grammar`, `structural_tag` and
    `json_object`.

    Raises:
        InvalidRequestError: no kind or two of them, a value of a wrong type or too large; it names
            `structured_outputs` and the field in it. What the value says is checked when it is compiled.
    """

    json: str | Mapping[str, Any] | bool | type | None = None
    """A JSON Schema (draft 2020-12 or 7), as text or data, or a class of pydantic's models. It is kept as text."""
    yaml: str | Mapping[str, Any] | bool | type | None = None
    """A schema as for `json`: the answer is the same data in YAML, in block style."""
    regex: str | None = None
    """A regular expression (Rust's dialect) that matches the whole answer."""
    choice: Sequence[str] | type | None = None
    """Texts, one of which is the answer; or a `Literal` or `Enum` of them."""
    grammar: str | None = None
    """A context-free grammar, in Lark's notation or in llama.cpp's GBNF: which one is seen from the text."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Text with parts that are held, between markers: a structural tag in XGrammar's and vLLM's forms. It is kept as
    text."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without white space between its tokens, in a structural tag too."""
    disable_additional_properties: bool = False
    """Objects hold the named properties alone, where a schema says nothing of others."""
    whitespace_pattern: str | None = None
    """A regular expression for the white space between tokens of JSON, in a structural tag too."""

    def __post_init__(self) -> None:
        self.json, self.yaml = _schema_text("json", self.json), _schema_text("yaml", self.yaml)
        if self.choice is not None:
            self.choice = _choices(self.choice)
        if self.json_object is False:
            self.json_object = None
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"two: {given[0]} and {given[1]}" if given else "none"
            raise _bad(None, f"must hold exactly one of {', '.join(KINDS)}; it holds {what}")
        if isinstance(self.structural_tag, Mapping):
            self.structural_tag = _as_text("structural_tag", self.structural_tag)
        for name in ("json", "yaml", "regex", "grammar", "structural_tag"):
            _check_text(name, getattr(self, name), MAX_SOURCE_BYTES)
        if self.json_object not in (None, True):
            raise _bad("json_object", "must be true or false")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if type(getattr(self, name)) is not bool:
                raise _bad(name, "must be true or false")
        _check_text("whitespace_pattern", self.whitespace_pattern, MAX_PATTERN_BYTES)
        kind = given[0]
        for name in ("disable_any_whitespace", "whitespace_pattern", "disable_additional_properties"):
            of = ["json", "json_object", "structural_tag"]
            of += ["yaml"] if name == "disable_additional_properties" else []
            if getattr(self, name) and kind not in of:
                raise _bad(name, f"belongs to {', '.join(of)}, not to {kind}")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise _bad("whitespace_pattern", "says what disable_any_whitespace excludes")

    @property
    def kind(self) -> str:
        """The one of `KINDS` that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @classmethod
    def from_mapping(cls, values: Any) -> "StructuredOutputsParams":
        """Build from names that came from outside; values of None count as left out.

        Raises:
            InvalidRequestError: no mapping, an unknown name (with the nearest known one), or what the class refuses.
        """
        if isinstance(values, cls):
            return replace(values)  # checked: it may have been changed since it was made
        if not isinstance(values, Mapping):
            raise _bad(None, f"must be an object, got {type(values).__name__}")
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidRequestError(unknown_name_message(f"field of {FIELD}", str(name), known), param=FIELD)
        return cls(**{name: value for name, value in values.items() if value is not None})


def is_raw_text(schema: Any, never: str) -> bool:
    """Whether a named parameter with this schema is written as plain text, and not as JSON: for the grammar that holds
    an answer, and the parser that reads it. `never` is the marker behind such a text, which it cannot hold."""
    if not isinstance(schema, Mapping) or schema.get("type") != "string" or not _RAW.issuperset(schema):
        return False
    texts = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
    longest = max(schema.get("minLength", 0), schema.get("maxLength", 0))
    return longest <= MAX_RAW_LENGTH and all(isinstance(one, str) and never not in one for one in texts)


def _bad(name: str | None, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{FIELD if name is None else f'{FIELD}.{name}'} {text}", param=FIELD)


def _schema_text(name: str, value: Any) -> Any:
    if isinstance(value, type):
        make = getattr(value, "model_json_schema", None)
        if make is None:
            raise _bad(name, f"must be a schema or a model of pydantic's, got the class {value.__name__}")
        value = make()
    return _as_text(name, value) if isinstance(value, Mapping | bool) else value


def _as_text(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _bad(name, f"must hold JSON values alone: {error}") from error
    except RecursionError as error:
        raise _bad(name, f"may be nested at most {MAX_NESTING} deep") from error


def _check_text(name: str, value: Any, at_most: int) -> None:
    if value is None:
        return
    if name in ("json", "yaml") and not isinstance(value, str):
        raise _bad(name, f"must be a schema: an object, true or false, or its text, not {type(value).__name__}")
    if not isinstance(value, str) or not value:
        raise _bad(name, "must be text that is not empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise _bad(name, "must be text that is valid Unicode") from error
    if size > at_most:
        raise _bad(name, f"may have at most {at_most} bytes, got {size}")


def _choices(choice: Any) -> list[str]:
    if get_origin(choice) is Literal:
        choice = list(get_args(choice))
    elif isinstance(choice, type) and issubclass(choice, enum.Enum):
        choice = [item.value for item in choice]
    if isinstance(choice, str | bytes) or not isinstance(choice, Sequence) or not choice:
        raise _bad("choice", "must be a list of texts that is not empty")
    if len(choice) > MAX_CHOICES:
        raise _bad("choice", f"may hold at most {MAX_CHOICES} texts, got {len(choice)}")
    for item in choice:
        if not isinstance(item, str):
            raise _bad("choice", f"must hold texts, got {type(item).__name__}")
    if not all(choice):
        raise _bad("choice", "must hold texts that are not empty")
    _check_text("choice", "".join(choice), MAX_SOURCE_BYTES)
    return list(dict.fromkeys(choice))
