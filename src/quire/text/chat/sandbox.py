"""The jinja2 environment in which chat templates run.

It gives a template what `transformers` gives it (trimmed blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`, `generation` blocks), in an immutable sandbox without a loader, and
sends every operation through the meter of `limits`: calls, filters, tests, operators and
attributes through the hooks of the sandbox; literals, slices, comparisons, `~` and loops through
internal filters that are put around those nodes when a template is parsed.
"""

import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from string import Formatter
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
import markupsafe
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from quire.text.chat import limits
from quire.text.chat.limits import Meter, TemplateLimitError

# Names that no template can write, for the filters that the parser puts in.
_SETTLE, _ITERATE, _CONCATENATE = " settle", " iterate", " concatenate"
_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # what the compiler adds to calls inside loops and blocks
_FILTERS = (
    "abs attr batch capitalize count d default dictsort e escape first float format indent int items join last "
    "length list lower map max min reject rejectattr replace reverse round safe select selectattr slice "
    "sort string sum title trim truncate upper"
).split()
_ITERATING = frozenset("map max min reject rejectattr select selectattr sort title".split())
_MAX_FORMAT_CHARACTERS = 128
_WIDE_FIELD = re.compile(r"\d{4}")


class _Namespace(jinja2.utils.Namespace):
    """A namespace that prints as a word and takes no private names."""

    def __init__(self, *sources: Any, **named: Any) -> None:
        values = _new_dict(*sources, **named)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Instrument(NodeTransformer):
    """Puts the internal filters around what the sandbox has no hook for."""

    def _settled(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _SETTLE)

    visit_List = visit_Dict = visit_Compare = _settled

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        return self.generic_visit(node) if node.ctx == "store" else self._settled(node)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _SETTLE) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.Tuple(node.nodes, "load", lineno=node.lineno), _CONCATENATE)

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _ITERATE)
        return node

    def _without_star(self, node: Any) -> jinja2.nodes.Node:
        if node.dyn_args is not None:
            raise jinja2.TemplateSyntaxError("'*' arguments are not supported", node.lineno)
        return self.generic_visit(node)

    visit_Call = visit_Filter = visit_Test = _without_star

    def visit_ScopedEvalContextModifier(self, node: jinja2.nodes.ScopedEvalContextModifier) -> jinja2.nodes.Node:
        # It would make `Markup`: strings whose methods are not those that the limits know.
        raise jinja2.TemplateSyntaxError("'autoescape' is not supported", node.lineno)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """One for all templates and threads; `meter.begin()` starts a rendering."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        extensions = (_GenerationExtension, jinja2.ext.loopcontrols)
        # Not optimised: folding constants would run operations while compiling, outside any meter.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.meter = Meter()
        self.finalize = self._finalize
        self.concat = self._concat  # type: ignore[method-assign]
        available = self.filters | _own_filters()
        self.filters = {name: self._metered(available[name], name in _ITERATING) for name in _FILTERS}
        self.filters["tojson"] = self._to_json
        self.filters[_SETTLE] = self.meter.settle
        self.filters[_ITERATE] = self.meter.iterate
        self.filters[_CONCATENATE] = self._metered(limits.concatenate_values, False)
        self.tests = {name: self._metered(test, False) for name, test in dict[str, Any](self.tests).items()}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | {
            "dict": _new_dict,
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }
        self.binop_table |= {
            "+": limits.add,
            "*": limits.multiply,
            "**": limits.power,
            "%": limits.modulo,
            **{sign: limits.arithmetic(self.binop_table[sign]) for sign in ("-", "/", "//")},
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def _metered(self, function: Callable[..., Any], is_iterating: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def metered(*arguments: Any, **named: Any) -> Any:
            if is_iterating:
                for value in arguments[:2]:  # the first may be jinja's context
                    if isinstance(value, str) and len(value) > limits.MAX_ITEMS:
                        raise TemplateLimitError("it takes a long string apart")
            return self.meter.settle(function(*arguments, **named))

        return metered

    def _concat(self, pieces: Iterable[str]) -> str:
        """What jinja joins the output of macros and blocks with."""
        text: str = self.meter.settle(limits.concatenate(pieces))
        return text

    @jinja2.pass_context
    def _finalize(self, context: jinja2.runtime.Context, value: Any) -> str:
        """What `{{ value }}` prints."""
        if type(value) is str:
            self.meter.charge(limits.string_bytes(value))
            return value
        self.meter.charge()
        text: str = self.meter.settle(str(value))
        return text

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if (indent if isinstance(indent, int) else len(indent or "")) > 16:
            raise TemplateLimitError("an indent of it is too large")
        if separators is not None and sum(map(len, separators)) > 16:
            raise TemplateLimitError("a separator of it is too long")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return str(self.meter.settle(encoder.encode(value)))
        pieces, size = [], 0
        for piece in encoder.iterencode(value):
            pieces.append(piece)
            size += len(piece)
            if size > limits.MAX_VALUE_BYTES:
                raise TemplateLimitError("a value of it is too large")
        return str(self.meter.settle("".join(pieces)))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        return self.meter.settle(self.binop_table[operator](left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.meter.charge()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in limits.VALUE_METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return True

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, BuiltinMethodType) or not isinstance(value.__self__, str):
            return None
        if value.__name__ == "format":
            return functools.partial(_MeteredFormatter(self).format, value.__self__)
        return None

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        self.meter.charge()
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str):
            replacement = limits.STRING_METHODS[obj.__name__]
            if replacement is not None:
                own = {name: value for name, value in named.items() if name not in _JINJA_ARGUMENTS}
                return self.meter.settle(replacement(obj.__self__, *arguments, **own))
        if isinstance(obj, jinja2.runtime.LoopContext) and arguments:  # a recursive loop
            arguments = (self.meter.iterate(arguments[0]), *arguments[1:])
        return self.meter.settle(super().call(context, obj, *arguments, **named))


class _MeteredFormatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format` without wide fields, each field charged."""

    def __init__(self, environment: TemplateEnvironment) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> str:
        if _WIDE_FIELD.search(format_spec):
            raise TemplateLimitError("a field width of it is too large")
        text: str = Formatter.format_field(self, value, format_spec)
        self._meter.settle(text)
        return text


def _own_filters() -> dict[str, Callable[..., Any]]:
    return {
        "join": _join_filter,
        "replace": _replace_filter,
        "trim": _trim_filter,
        "format": _format_filter,
        "indent": _indent_filter,
        "batch": _batch_filter,
        "slice": _slice_filter,
        "list": limits.as_items,
        # Plain strings, not `Markup`, which would bring methods of its own.
        "safe": str,
        "e": _escape_filter,
        "escape": _escape_filter,
        "int": _int_filter,
        "round": _round_filter,
        "sum": _sum_filter,
    }


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = limits.as_items(value)
    if attribute is not None:
        getter = jinja2.filters.make_attrgetter(environment, attribute)
        items = [getter(item) for item in items]
    return limits.join(str(d), items)


def _replace_filter(text: Any, old: str, new: str, count: int | None = None) -> str:
    return limits.replace(str(text), str(old), str(new), count)


def _escape_filter(value: Any) -> str:
    return str.__str__(markupsafe.escape(value))


def _trim_filter(value: Any, chars: str | None = None) -> str:
    return limits.strip(str(value), chars)


def _format_filter(value: Any, *arguments: Any, **named: Any) -> str:
    return str(limits.modulo(str(value), named or arguments))


def _indent_filter(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    step = limits.ITEM_BYTES + 4 * (width if isinstance(width, int) else len(width))
    if limits.string_bytes(text) + step * (text.count("\n") + 1) > limits.MAX_VALUE_BYTES:
        raise TemplateLimitError("an indent of it is too large")
    return jinja2.filters.do_indent(text, width, first, blank)


def _batch_filter(value: Any, linecount: int, fill_with: Any = None) -> Any:
    if linecount > limits.MAX_ITEMS:
        raise TemplateLimitError("a batch of it is too large")
    return jinja2.filters.do_batch(limits.as_items(value), linecount, fill_with)


def _slice_filter(value: Any, slices: int, fill_with: Any = None) -> Any:
    if slices > limits.MAX_ITEMS:
        raise TemplateLimitError("it cuts into too many slices")
    return jinja2.filters.sync_do_slice(limits.as_items(value), slices, fill_with)


def _int_filter(value: Any, default: int = 0, base: int = 10) -> int:
    # Beyond this length only bases that are powers of two are read at all, into numbers of any size.
    return default if isinstance(value, str) and len(value) > 2048 else jinja2.filters.do_int(value, default, base)


def _round_filter(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 64:
        raise TemplateLimitError("a precision of it is too large")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum_filter(environment: jinja2.Environment, value: Any, attribute: Any = None, start: float = 0) -> float:
    items = limits.as_items(value)
    if attribute is not None:
        getter = jinja2.filters.make_attrgetter(environment, attribute)
        items = [getter(item) for item in items]
    return functools.reduce(limits.arithmetic(operator.add), items, start)


def _new_dict(*sources: Any, **named: Any) -> dict[str, Any]:
    """`dict(...)`; with string keys only, because other keys can be made to collide."""
    result: dict[str, Any] = {}
    for source in sources:
        pairs = source.items() if isinstance(source, Mapping) else limits.as_items(source)
        for key, value in pairs:
            if not isinstance(key, str):
                raise TypeError("the keys of dict() must be strings")
            result[key] = value
    return result | named


def _raise(message: Any) -> None:
    """`raise_exception`: the template refuses the conversation."""
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_FORMAT_CHARACTERS:
        raise TemplateLimitError("a date format of it is too long")
    return datetime.now().strftime(format)
