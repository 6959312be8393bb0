"""The flags that hold answers to a shape."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequestError
from quire.structured_params import FIELD, StructuredOutputsParams

KINDS = {"json_schema": "json", "yaml_schema": "yaml", "regex": "regex", "grammar": "grammar", "choice": "choice"}
"""Flag -> the field of `StructuredOutputsParams`."""
_FLAGS = {field: flag for flag, field in KINDS.items()}
_FIELD = re.compile(rf"\b{FIELD}\.(\w+)")


def add(parser: Any, *, required: bool = False) -> None:
    """One of the kinds, and what belongs to JSON."""
    shape = parser.add_mutually_exclusive_group(required=required)
    shape.add_argument("--json-schema", metavar="FILE", help="a JSON Schema; text that begins with { will do")
    shape.add_argument("--yaml-schema", metavar="FILE", help="a JSON Schema; the answer is the same data in YAML")
    shape.add_argument("--regex", metavar="REGEX", help="a regular expression for the whole answer")
    shape.add_argument("--grammar", metavar="FILE", help="a grammar in Lark's notation or in GBNF")
    shape.add_argument(
        "--choice", metavar="TEXT", nargs="+", action="extend", help="texts, one of which is the answer; -- ends them"
    )
    parser.add_argument("--disable-any-whitespace", action="store_true", help="JSON without white space")
    text = "objects hold the named properties alone"
    parser.add_argument("--disable-additional-properties", action="store_true", help=text)
    parser.add_argument("--whitespace-pattern", metavar="REGEX", help="for the white space between tokens of JSON")


def take(options: argparse.Namespace) -> None:
    """Make what the flags ask for one of the sampling parameters.

    Raises:
        InvalidRequestError: see `read`.
    """
    found = read(options)
    if found is not None:
        options.structured_outputs = found


def read(options: argparse.Namespace) -> StructuredOutputsParams | None:
    """What the flags ask for; None if they ask for nothing.

    Raises:
        InvalidRequestError: a file that cannot be read, or what the class refuses.
    """
    given = next((name for name in KINDS if getattr(options, name) is not None), None)
    if given is None:
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if getattr(options, name):
                raise InvalidRequestError(f"--{name.replace('_', '-')} needs --json-schema", param=name)
        return None
    value = getattr(options, given)
    if given in ("json_schema", "yaml_schema", "grammar"):
        value = value if given != "grammar" and value.lstrip().startswith("{") else text_of(value)
    with named():
        return StructuredOutputsParams(
            **{KINDS[given]: value},
            disable_any_whitespace=options.disable_any_whitespace,
            disable_additional_properties=options.disable_additional_properties,
            whitespace_pattern=options.whitespace_pattern,
        )


@contextmanager
def named() -> Iterator[None]:
    """A refusal of a shape names the flag, and not the sampling parameter that was made of it."""
    try:
        yield
    except InvalidRequestError as error:
        text = _FIELD.sub(lambda found: "--" + _FLAGS.get(found[1], found[1]).replace("_", "-"), error.message)
        if text == error.message:
            raise
        raise InvalidRequestError(text, param=error.param) from error


def text_of(path: str) -> str:
    """A file's text.

    Raises:
        InvalidRequestError: there is none.
    """
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (getattr(error, "strerror", None) or "it is not UTF-8").lower()
        raise InvalidRequestError(f"{path[:200]}: no text can be read there: {why}") from error
