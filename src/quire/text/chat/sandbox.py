"""The jinja2 environment in which chat templates run.

It is jinja2's immutable sandbox, set up as `transformers` does it (trimmed blocks, loop controls,
`tojson`, `raise_exception`, `strftime_now`, `generation` blocks; all filters and tests), without a
loader and without `lipsum`. What a template computes passes through the budget of `limits`: calls,
filters, tests, operators and attributes through the hooks of the sandbox; literals, slices, `~`,
loops and comparisons through three internal filters that are put around those nodes when a template is parsed.
"""

import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from quire.text.chat import limits
from quire.text.chat.limits import Budget, TemplateLimitError, require, size_of

_CHARGE, _COUNT, _TIME = " charge", " count", " time"  # names that no template can write
_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # what the compiler adds to calls inside loops and blocks
_MAX_FORMAT_CHARACTERS = 128
_MAX_INDENT = 16
_MAX_POWER_BITS = 8192


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """One for all templates and threads; `budget.start()` begins a rendering."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = (_GenerationExtension, jinja2.ext.loopcontrols)
        # Not optimised: what can be computed before a rendering is not worth a second place that computes.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.budget = Budget()
        self.finalize = self._finalize
        self.concat = self._concat  # type: ignore[method-assign]
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {_CHARGE: self.budget.charge, _COUNT: self.budget.count, _TIME: self.budget.timed}
        self.tests = {name: self._counted(test) for name, test in dict[str, Any](self.tests).items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _TemplateDict(),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _modulo}

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is estimated before and charged after."""
        place = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja's context comes first

        @functools.wraps(function)
        def bounded(*arguments: Any, **named: Any) -> Any:
            before, operands = arguments[:place], list(arguments[place:])
            if name in limits.CONSUMING and isinstance(operands[0], Iterator):
                operands[0] = list(operands[0])
            require(limits.filter_size(name, *operands, **named))
            return self.budget.charge(function(*before, *operands, **named))

        return bounded

    def _counted(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def counted(*arguments: Any, **named: Any) -> Any:
            return self.budget.timed(test(*arguments, **named))

        return counted

    def _concat(self, pieces: Iterable[str]) -> str:
        """What jinja joins the output of macros and blocks with."""
        pieces = list(pieces)
        require(sum(map(len, pieces)))
        text: str = self.budget.charge("".join(pieces))
        return text

    def _finalize(self, value: Any) -> Any:
        """What `{{ value }}` prints."""
        return self.budget.charge(value if isinstance(value, str) else str(value))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "-" and not isinstance(right, int | float):
            right = limits.few(right)
        return self.budget.charge(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return next((attr in names for kind, names in limits.METHODS.items() if isinstance(obj, kind)), True)

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        self.budget.spend()
        own = {name: value for name, value in named.items() if name not in _JINJA_ARGUMENTS}
        is_macro = isinstance(obj, jinja2.runtime.Macro)
        if (arguments or own) and (not is_macro or obj.catch_varargs or obj.catch_kwargs):
            require(size_of([arguments, own]))  # they may become one value: `varargs`, the items of a cycler
        if isinstance(obj, jinja2.runtime.LoopContext) and arguments:  # a recursive loop
            arguments = (self.budget.count(arguments[0]), *arguments[1:])
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        text = None if is_macro else getattr(method, "__self__", None)
        if not isinstance(text, str):
            return self.budget.charge(super().call(context, obj, *arguments, **named))
        if method.__name__ == "join" and arguments:
            arguments = (list(arguments[0]), *arguments[1:])
        estimate = limits.METHOD_SIZES.get(method.__name__)
        if estimate is not None:
            require(estimate(str(text), *arguments, **own))
        result = super().call(context, obj, *arguments, **named)
        self.budget.spend(size_of(result))  # the parts of a string are new, each of them
        return self.budget.charge(result)


class _Instrument(NodeTransformer):
    """Puts the internal filters around what the sandbox has no hook for."""

    def _charged(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _CHARGE)

    visit_List = visit_Dict = _charged

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        return self.generic_visit(node) if node.ctx == "store" else self._charged(node)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        return self._charged(node) if isinstance(node.arg, jinja2.nodes.Slice) else self.generic_visit(node)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(operand, _CHARGE) for operand in node.nodes]
        return _filtered(node, _CHARGE)

    def visit_Operand(self, node: jinja2.nodes.Operand) -> jinja2.nodes.Node:
        node.expr = _filtered(self.visit(node.expr), _TIME)
        return node

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNT)
        return node

    def _counted_star(self, node: Any) -> jinja2.nodes.Node:
        visited: jinja2.nodes.Node = self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filtered(node.dyn_args, _COUNT)
        return visited

    visit_Call = visit_Filter = visit_Test = _counted_star


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that prints as a word (what it holds has been counted elsewhere) and takes no private names."""

    def __init__(self, *sources: Any, **named: Any) -> None:
        values = dict(*map(limits.few, sources), **named)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


class _TemplateDict:
    """`dict(...)` and `dict.fromkeys(...)`, without the attributes of a type."""

    def __call__(self, *sources: Any, **named: Any) -> dict[Any, Any]:
        return dict(*map(limits.few, sources), **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(limits.few(keys), value)


def _raise(message: Any) -> None:
    """`raise_exception`: the template refuses the conversation."""
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_FORMAT_CHARACTERS:
        raise TemplateLimitError("a date format of it is too long")
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (indent if isinstance(indent, int) else len(indent or "")) > _MAX_INDENT:
        raise TemplateLimitError("an indent of it is too large")
    if separators is not None and sum(map(len, separators)) > _MAX_INDENT:
        raise TemplateLimitError("a separator of it is too long")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    pieces, size = [], 0
    for piece in encoder.iterencode(value):  # each line is as long as its value is deep
        pieces.append(piece)
        size += len(piece)
        require(size)
    return "".join(pieces)


def _add(left: Any, right: Any) -> Any:
    if not isinstance(left, int | float):
        require(size_of(left) + size_of(right))
    return operator.add(left, right)


def _multiply(left: Any, right: Any) -> Any:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            require(size_of(value) * times)
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_POWER_BITS:
        raise TemplateLimitError("a number of it is too large")
    return operator.pow(left, right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        require(limits.printf_size(str(left), right))
    return operator.mod(left, right)
