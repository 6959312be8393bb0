"""Calls whose arguments are named values, one after the other: Qwen3-Coder's XML, Python, and FunctionGemma's."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.structured_params import is_raw_text
from quire.text.parsers.events import Asked, Tool
from quire.text.parsers.reader import Reader, Step, partial
from quire.text.parsers.tags import NOTHING, Format, Marker, const, one_of, sequence, tag, tags, text_with_tags

_END_OF_PARAMETER = "</parameter>"
_LONGEST_NAME = 256


def parameters_of(tool: Tool, style: str, escape: Marker = NOTHING) -> Format:
    """Its arguments, in a style of `json_schema`."""
    found: dict[str, Any] = {"type": "json_schema", "json_schema": tool.schema, "style": style}
    if escape.text:
        found["escape"] = escape.format
    return found | {"disable_additional_properties": True} if tool.strict else found


def _schema_of(tool: Tool, name: str) -> Any:
    return tool.schema.get("properties", {}).get(name, {})


def _value_text(text: str, schema: Any) -> str:
    """A value as JSON: what stands there, or the text itself where it is none or must be a text. JSON stays as it was
    written: a number may be larger than any of Python's, and an escape may stand for half a character."""
    must_be_text = isinstance(schema, Mapping) and schema.get("type") == "string"
    is_json = _is_json(text)
    value = json.loads(text) if is_json else _literal(text)
    if value is _NO_LITERAL or (must_be_text and not isinstance(value, str)):
        return json.dumps(text, ensure_ascii=False)
    return text if is_json else _json(value)


def _json(value: Any) -> str:
    """As JSON, with half characters as escapes."""
    found = json.dumps(value, ensure_ascii=False)
    try:
        found.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return found


def _no_number(name: str) -> Any:
    raise ValueError(name)


_NO_LITERAL = object()


def _literal(text: str) -> Any:
    """A literal of Python that JSON can hold."""
    try:
        value = ast.literal_eval(text.strip()) if len(text) < 100_000 else _NO_LITERAL
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NO_LITERAL
    return value


def _value(reader: Reader, quotes: tuple[str, ...], stops: str) -> Step[str | None]:
    """Read a value up to one of `stops` outside quotes and brackets; None where the text ends before."""
    begun, depth, quote = reader.at, 0, ""
    while one := (yield from reader.peek()):
        if quote:
            if (yield from reader.take(quote)):
                quote = ""
            else:
                reader.at += 1
                if one == "\\" and len(quote) == 1:
                    yield from reader.peek()
                    reader.at += 1
            continue
        if depth == 0 and one in stops:
            return reader.text[begun : reader.at]
        quote = (yield from reader.take_first(quotes)) or ""
        if not quote:
            depth += (one in "[{(") - (one in "]})")
            reader.at += 1
    return None


def _json_before(reader: Reader, end: str) -> Step[str | None]:
    """A value of JSON, whose texts may hold `end`, up to it; what is no JSON ends with the first one."""
    yield from reader.space()
    begun = reader.at
    value = yield from reader.json_value()
    yield from reader.space()
    if value is not None and _is_json(value) and (yield from reader.take(end)):
        return value
    reader.at = begun
    return (yield from reader.before(end, 2**20))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return False
    return True


class _Arguments:
    """Writes the arguments of a call as JSON while their values come."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._is_first = True

    def name(self, name: str) -> None:
        self._reader.more_arguments(("{" if self._is_first else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
        self._is_first = False

    def raw(self, end: str) -> Step[bool]:
        """Text as it is, up to `end`, given on as it comes; whether the end came."""
        reader = self._reader
        reader.more_arguments('"')
        while True:
            reader.forget()
            place = reader.text.find(end)
            size = place if place >= 0 else len(reader.text) - partial(reader.text, [end])
            reader.more_arguments(json.dumps(reader.text[:size], ensure_ascii=False)[1:-1])
            reader.at = size
            if place >= 0:
                reader.at += len(end)
                reader.more_arguments('"')
                return True
            reader.forget()
            if not (yield from reader.more()):
                return False

    def end(self) -> None:
        self._reader.more_arguments("{}" if self._is_first else "}")
        self._reader.end_call()


@dataclass(frozen=True, slots=True)
class QwenXml:
    """`<tool_call>`, `<function=NAME>` and a `<parameter=NAME>` for each argument."""

    open: Marker
    close: Marker
    name: str = "qwen3_coder"
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes calls."""
        return (self.open, self.close)

    def held(self, asked: Asked) -> Format:
        """As for `MarkedJson`."""
        calls = [
            tag(f"\n<function={tool.name}>\n", parameters_of(tool, "qwen_xml"), "</function>\n") for tool in asked.tools
        ]
        marked = tag(self.open, one_of(calls), self.close)
        if asked.must_call:
            return tags([marked], "\n", several=asked.parallel)
        return text_with_tags([self.open], [marked], several=asked.parallel)

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """As for `MarkedJson`."""
        while (yield from reader.until([self.open.text])):
            begun, tool = reader.at, None
            yield from reader.space()
            if (yield from reader.take("<function=")):
                name = yield from reader.before(">", _LONGEST_NAME)
                tool = None if name is None else asked.tool(name)
            if tool is None:  # it only looked like a marker
                reader.at = begun
                reader.say(self.open.text)
                continue
            reader.start_call(tool.name)
            yield from self._read_parameters(reader, tool)
            yield from reader.space()
            if (yield from reader.take(self.close.text)):
                reader.part_ends()

    @staticmethod
    def _read_parameters(reader: Reader, tool: Tool) -> Step[None]:
        found = _Arguments(reader)
        while True:
            yield from reader.space()
            end = yield from reader.take_first(("<parameter=", "</function>"))
            if end == "</function>":
                found.end()
            name = (yield from reader.before(">", _LONGEST_NAME)) if end == "<parameter=" else None
            if name is None:
                return
            found.name(name)
            schema = _schema_of(tool, name)
            if is_raw_text(schema, _END_OF_PARAMETER):
                yield from reader.take("\n")
                if not (yield from found.raw(f"\n{_END_OF_PARAMETER}")):
                    return
                continue
            value = yield from _json_before(reader, _END_OF_PARAMETER)
            if value is None:
                return
            reader.more_arguments(_value_text(value.strip(), schema))


@dataclass(frozen=True, slots=True)
class Pythonic:
    """`[NAME(argument=value, ...), ...]` as Llama 4 writes calls: a text becomes one by its whole beginning."""

    name: str = "llama4_pythonic"
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """None."""
        return ()

    def held(self, asked: Asked) -> Format:
        """As for `MarkedJson`."""
        held = {tool.name: parameters_of(tool, "python") for tool in asked.tools}
        calls = [tag(f"{name}(", arguments, ")") for name, arguments in held.items()]
        if asked.must_call:
            return tag("[", tags(calls, ", ", several=asked.parallel), "]")
        more = [const(")"), sequence(const("), "), tags(calls, ", ", several=True))]
        after = sequence(one_of(more), const("]")) if asked.parallel else const(")]")
        first = [tag(f"[{name}(", sequence(arguments, after), "") for name, arguments in held.items()]
        return text_with_tags([Marker(f"[{tool.name}(") for tool in asked.tools], first, several=False)

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """As for `MarkedJson`."""
        while opening := (yield from reader.until([f"[{name}(" for name in sorted(reader.names)])):
            tool = asked.tool(opening[1:-1])
            while tool is not None:
                reader.start_call(tool.name)
                if not (yield from self._read_arguments(reader)):
                    return
                tool = None
                if (yield from reader.space()) == ",":
                    reader.at += 1
                    yield from reader.space()
                    name = yield from reader.before("(", _LONGEST_NAME)
                    tool = None if name is None else asked.tool(name.strip())
            if (yield from reader.peek()) == "]":
                reader.at += 1

    @staticmethod
    def _read_arguments(reader: Reader) -> Step[bool]:
        found = _Arguments(reader)
        while (one := (yield from reader.space())) != ")":
            if one == ",":
                reader.at += 1
                continue
            name = yield from reader.before("=", _LONGEST_NAME)
            value = None if name is None else (yield from _value(reader, ('"', "'"), ",)"))
            if name is None or value is None:
                return False
            found.name(name.strip())
            reader.more_arguments(_value_text(value, {}))
        reader.at += 1
        found.end()
        return True


@dataclass(frozen=True, slots=True)
class Gemma:
    """`<start_function_call>call:NAME{argument:value,...}<end_function_call>`, texts between two `<escape>`."""

    open: Marker
    close: Marker
    escape: Marker
    name: str = "functiongemma"
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes calls, and texts in them."""
        return (self.open, self.close, self.escape)

    def held(self, asked: Asked) -> Format:
        """As for `MarkedJson`."""
        calls = [tag(f"call:{tool.name}{{", parameters_of(tool, "gemma", self.escape), "}") for tool in asked.tools]
        marked = tag(self.open, one_of(calls), self.close)
        if asked.must_call:
            return tags([marked], "", several=asked.parallel)
        return text_with_tags([self.open], [marked], several=asked.parallel)

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """As for `MarkedJson`."""
        while (yield from reader.until([self.open.text])):
            begun, tool = reader.at, None
            if (yield from reader.take("call:")):
                name = yield from reader.before("{", _LONGEST_NAME)
                tool = None if name is None else asked.tool(name)
            if tool is None:  # it only looked like a marker
                reader.at = begun
                reader.say(self.open.text)
                continue
            reader.start_call(tool.name)
            if (yield from self._read_arguments(reader, tool)):
                yield from reader.space()
                yield from reader.take(self.close.text)
                reader.part_ends()

    def _read_arguments(self, reader: Reader, tool: Tool) -> Step[bool]:
        found, escape = _Arguments(reader), self.escape.text
        while (one := (yield from reader.space())) != "}":
            if one == ",":
                reader.at += 1
                continue
            name = yield from reader.before(":", _LONGEST_NAME)
            if name is None:
                return False
            name = name.strip()
            if (yield from reader.take(escape)):
                found.name(name)
                if not (yield from found.raw(escape)):
                    return False
                continue
            value = yield from _value(reader, (escape, '"'), ",}")
            if value is None:
                return False
            found.name(name)
            reader.more_arguments(_value_text(self._as_json(value), _schema_of(tool, name)))
        reader.at += 1
        found.end()
        return True

    def _as_json(self, text: str) -> str:
        """A value whose texts stand between escapes, and whose keys are bare."""
        escape = re.escape(self.escape.text)
        parts = re.split(f'({escape}.*?{escape}|"(?:[^"\\\\]|\\\\.)*")', text, flags=re.DOTALL)
        size = len(self.escape.text)
        for place, part in enumerate(parts):
            if part.startswith(self.escape.text) and place % 2:
                parts[place] = json.dumps(part[size:-size], ensure_ascii=False)
            elif place % 2 == 0:
                parts[place] = re.sub(r"(?<=[{,])\s*(\w[\w-]*)\s*:", r'"\1":', part)
        return "".join(parts)
