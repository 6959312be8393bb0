"""Bodies of requests: one declaration a field, from which the parser, the refusals, the JSON schema and the guide come.

A body is a `msgspec.Struct` whose fields are `Annotated[type, Field(...)]`. A known field that is not honoured is
`Annotated[Any, Refused(...)]`, and `Flattened` marks a value whose own fields stand in the body beside the others.
Types check values, structs below the body included; what needs two fields or the model is checked by the API.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from quire.errors import InvalidRequestError, unknown_name_message
from quire.sampling_params import Range
from quire.server.http.limits import Limit, Limits

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
B = TypeVar("B", bound=msgspec.Struct)
REFERENCE = "#/components/schemas/{name}"
_MUST = {bool: "be true or false", str: "be a string", int: "be a whole number", float: "be a number"}
_NAMED = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Field:
    """A field that is honoured, beyond its name, type and default.

    Args:
        text: what it does, for the schema and the guide.
        must: what a refusal of its value says: "be one of ..."; made from the type where that says enough.
        aliases: other names of it.
        limit: the entry of `Limits` that bounds its length.
        schema: its JSON schema, where the type does not give it.
    """

    text: str
    must: str = ""
    aliases: tuple[str, ...] = ()
    limit: str = ""
    schema: Schema | Callable[[Limits], Schema] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A known field that is not honoured: why, and the values that ask for nothing (null always does)."""

    reason: str
    neutral: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether a value asks for nothing; `true` is not 1."""
        return value is None or any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in self.neutral
        )


@dataclass(frozen=True, slots=True)
class Flattened:
    """Fields of a struct, or of a dictionary checked elsewhere, that stand in the body itself."""

    fields: Mapping[str, Field | Refused] | None = None
    """Of the dictionary; None: the type is a struct."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One field of a body."""

    name: str
    type: Any
    spec: Field | Refused
    group: str
    """The flattened value that holds it; "": the body."""
    default: Any = None
    required: bool = False


class RequestSchema(Generic[B]):
    """The fields of one body.

    Args:
        body: the struct that `read` makes.
    """

    def __init__(self, body: type[B]) -> None:
        self.body = body
        self.fields: dict[str, Declared] = {}
        self._groups: list[str] = []
        self._below: dict[str, type[msgspec.Struct]] = {}
        for field in _declared(body, "", self._groups):
            self.fields[field.name] = field
            self._below.update(_structs(field.type, field.name))
        self._names = dict(self.fields)
        for field in self.fields.values():
            self._names |= dict.fromkeys(field.spec.aliases, field)

    def known(self) -> list[str]:
        """Every name that is understood, honoured or not."""
        return sorted(self._names)

    @property
    def refused(self) -> dict[str, Refused]:
        """The fields that are not honoured, under each of their names."""
        return {name: field.spec for name, field in self._names.items() if isinstance(field.spec, Refused)}

    def inside(self) -> Iterator[tuple[str, type[msgspec.Struct], str, Field | Refused]]:
        """The fields of objects in the body: where the object stands, what it is, the field's name, what it says."""
        for place, struct in self._below.items():
            yield from ((place, struct, name, spec) for name, (spec, _) in _specs(struct).items())

    def read(self, raw: Mapping[str, Any], limits: Limits) -> B:
        """The body, checked. A null is a field left out.

        Raises:
            InvalidRequestError: a field is unknown (with the nearest known one), refused, of a wrong type or out of
                range, or contradicts another name of the same field.
            ApiError: a field is longer than its limit.
        """
        values: dict[str, Any] = {group: {} for group in self._groups}
        first: dict[str, str] = {}
        for given, value in raw.items():
            field = self._names.get(given)
            if field is None:
                raise InvalidRequestError(unknown_name_message("field", given[:64], self.known()), param=given[:64])
            spec = field.spec
            if isinstance(spec, Refused):
                if not spec.accepts(value):
                    raise InvalidRequestError(f"{given} is not supported: {spec.reason}", param=given)
            elif value is not None:
                if spec.limit and isinstance(value, _counted(field.type)):
                    check_length(getattr(limits, spec.limit), value, given)
                holder = values[field.group] if field.group else values
                held = holder.setdefault(field.name, value)
                if held != value or type(held) is not type(value):  # `true` and 1.0 are not 1
                    other = first[field.name]
                    raise InvalidRequestError(f"{given} and {other} are one field and differ", param=given)
                first.setdefault(field.name, given)
        try:
            return msgspec.convert(values, self.body)
        except msgspec.ValidationError as error:
            flat = {name: value for group in self._groups for name, value in values[group].items()}
            raise self._refusal(str(error), values | flat) from error

    def refusal(self, name: str) -> InvalidRequestError:
        """Of a value that the type of a field lets through."""
        spec = self.fields[name].spec
        return InvalidRequestError(f"{name} must {getattr(spec, 'must', '')}", param=name)

    def _refusal(self, text: str, values: Mapping[str, Any]) -> InvalidRequestError:
        """What msgspec found, in the words of the declarations: it says what is wrong, and where as a path."""
        problem, at, path = text.replace(" - at `key` in `$", " - at `$").rpartition(" - at `$")
        problem, place = (problem, path.rstrip("`").removeprefix(".")) if at else (text, "")
        if place.partition(".")[0] in self._groups:
            place = place.partition(".")[2]
        named = _NAMED.fullmatch(problem)
        owner, place = place, ".".join(filter(None, (place, named[2][:64]))) if named else place
        form = re.sub(r"\[[^\]]*\]", "[]", place)
        for below, struct in self._below.items():
            whole = getattr(struct, "unsupported", "")
            if whole and (form + ".").startswith(below + "."):
                part = ".".join(place.split(".")[: below.count(".") + 1])
                kind = _kind(values, part)
                if kind not in get_args(_specs(struct)["type"][1]):
                    shown = "" if kind is None else f" of type {kind[:32]!r}"
                    return InvalidRequestError(f"{part}{shown} is not supported: {whole}", param=part)
        above, _, name = form.removesuffix("[]").rpartition(".")
        specs = _specs(self._below[above]) if above in self._below else {}
        param = place if "[" in place else place.partition(".")[0]
        if named and named[1] == "contains unknown":
            known = [f"{owner}.{item}" for item in specs]
            return InvalidRequestError(unknown_name_message("field", place, known), param=param)
        if form in self._below:
            must = getattr(self.fields[form].spec, "must", "") if form in self.fields else ""
            return InvalidRequestError(f"{place} must {must or 'be an object'}", param=param)
        if not specs:
            place = param = re.sub(r"\W.*", "", place)
        spec, kind = specs.get(name) or (self.fields[place].spec, self.fields[place].type)
        if isinstance(spec, Refused):
            return InvalidRequestError(f"{place} is not supported: {spec.reason}", param=param)
        must = spec.must or _MUST.get(_plain(kind), "be of another type")
        return InvalidRequestError(f"{place} {'is required and ' if named else ''}must {must}", param=param)

    def json_schema(self, limits: Limits) -> tuple[Schema, dict[str, Schema]]:
        """The schema of the body, and those of the structs below it by their names."""
        typed = [item for item in self.fields.values() if isinstance(item.spec, Field) and item.spec.schema is None]
        made, components = msgspec.json.schema_components([item.type for item in typed], ref_template=REFERENCE)
        schemas = dict(zip((item.name for item in typed), made, strict=True))
        for struct in self._below.values():
            for name, (spec, _) in _specs(struct).items():
                _describe(components[struct.__name__]["properties"][name], spec, limits)
        properties: dict[str, Schema] = {}
        required = []
        for name, field in sorted(self._names.items()):
            spec = field.spec
            if isinstance(spec, Refused):
                values = [*spec.neutral, None]
                properties[name] = {"enum": values, "description": f"not supported: {spec.reason}"}
                continue
            own = spec.schema(limits) if callable(spec.schema) else spec.schema
            schema = _describe(dict(own if own is not None else schemas[field.name]), spec, limits)
            if field.required and not spec.aliases:
                required.append(name)
            elif {"type": "null"} not in schema.get("anyOf", ()):
                if field.default not in (None, msgspec.NODEFAULT):
                    schema["default"] = field.default
                noted = {"deprecated": True} if schema.pop("deprecated", False) else {}
                schema = {"anyOf": [schema, {"type": "null"}], **noted}
            properties[name] = schema
        found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        for field in self.fields.values():
            if field.required and field.spec.aliases:  # under one of its names, and not null there
                given = ({"required": [name], "properties": {name: schemas[field.name]}}
                         for name in (field.name, *field.spec.aliases))  # fmt: skip
                found["anyOf"] = [*given]
        return {**found, "required": required} if required else found, components


def check_length(limit: Limit, value: Any, place: str) -> None:
    """Refuse what is longer than its limit.

    Raises:
        ApiError: it is.
    """
    if len(value) > limit.value:
        raise limit.error(f"{len(value):,}" + ("" if limit.param else f" in {place}"), place)


def array(items: Schema, most: int | None = None, least: int = 0) -> Schema:
    """The schema of a list."""
    bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": items, **bounds}


def number(allowed: Range) -> Schema:
    """The schema of a number in a range."""
    low = "exclusiveMinimum" if allowed.is_above_low else "minimum"
    return {"type": "integer" if allowed.is_whole else "number", low: allowed.low, "maximum": allowed.high}


def _declared(body: type[msgspec.Struct], group: str, groups: list[str]) -> Iterator[Declared]:
    hints = get_type_hints(body, include_extras=True)
    for item in msgspec.structs.fields(body):
        kind, spec = _parts(hints[item.name])
        if not isinstance(spec, Flattened):
            yield Declared(item.name, hints[item.name], spec, group, item.default, item.required)
            continue
        groups.append(item.name)
        if spec.fields is None:
            yield from _declared(kind, item.name, groups)
        else:
            yield from (Declared(name, Any, field, item.name) for name, field in spec.fields.items())


def _parts(hint: Any) -> tuple[Any, Any]:
    """The type, and the declaration beside it."""
    kind, *marks = get_args(hint)
    return kind, next(mark for mark in marks if isinstance(mark, Field | Refused | Flattened))


def _specs(struct: type[msgspec.Struct]) -> dict[str, tuple[Field | Refused, Any]]:
    hints = get_type_hints(struct, include_extras=True)
    return {
        name: _parts(hints[name])[::-1] for name in struct.__struct_fields__ if get_origin(hints[name]) is Annotated
    }


def _structs(hint: Any, path: str) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Structs below a type, by where they stand: `messages[]`, `messages[].content[]`."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield path, hint
        for name, (_, kind) in _specs(hint).items():
            yield from _structs(kind, f"{path}.{name}")
    for item in get_args(hint):
        yield from _structs(item, path + "[]" * (get_origin(hint) is list))


def _plain(hint: Any) -> Any:
    """A type without its annotations and without null."""
    while not isinstance(hint, type):
        hint = next((item for item in get_args(hint) if item is not type(None)), object)
    return hint


@cache
def _counted(hint: Any) -> type:
    """What a limit of a field bounds: a list, else an object, else a text."""
    kinds, hints = set(), [hint]
    while hints:
        item = hints.pop()
        kinds.add(get_origin(item) or item)
        hints += get_args(item)
    return next(kind for kind in (list, dict, str) if kind in kinds)


def _kind(values: Mapping[str, Any], place: str) -> str | None:
    """How the value at a place names its type."""
    value: Any = values
    for step in re.findall(r"\w+", place):
        value = value[int(step)] if isinstance(value, list) else value[step]
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def _describe(schema: Schema, spec: Field | Refused, limits: Limits) -> Schema:
    """With its text, and its limit: of the list's items where there is a list, else of the characters."""
    if isinstance(spec, Refused):
        schema["description"] = f"not supported: {spec.reason}"
        return schema
    if spec.limit and spec.schema is None:
        for kind, bound in (("array", "maxItems"), ("string", "maxLength")):
            form = next((form for form in (schema, *schema.get("anyOf", ())) if form.get("type") == kind), None)
            if form is not None:
                form[bound] = getattr(limits, spec.limit).value
                break
    schema["description"] = spec.text
    return schema
