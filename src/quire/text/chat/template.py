"""Rendering chat templates: `transformers`' rules, inside a sandbox with bounds on time and memory."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from quire.errors import InvalidRequestError
from quire.text.chat.limits import MAX_VALUE_BYTES, size_of
from quire.text.chat.sandbox import TemplateEnvironment

_MAX_TEMPLATE_CHARACTERS = 256 << 10
_MAX_TEMPLATE_TOKENS = 16 << 10  # compiling takes some 40 microseconds and 3 KB for each; large templates have 6,000
_MAX_NESTING = 1 << 20  # squares of depths: compiling an expression takes time with the cube of its depth
_MAX_COMPILED = 8
_MAX_MESSAGE_CHARACTERS = 300
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class ChatTemplates:
    """Compiles and renders templates; keeps the last few compiled. Safe to share between threads.

    A rendering ends within about a second of CPU time and 64 MB of intermediate values, or raises
    `InvalidRequestError`; so does everything else that goes wrong in a template.
    """

    def __init__(self) -> None:
        self._environment = TemplateEnvironment()
        self._compiled = functools.lru_cache(maxsize=_MAX_COMPILED)(self._compile)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template. `variables` must be plain data, see `messages.plain_data`."""
        template = self._compiled(source)[0]
        return str(self._guarded(lambda: self._joined(template, variables)))

    def iterates_content(self, source: str) -> bool:
        """Whether the template takes a message's content as a list of parts, not only as a string."""
        return self._compiled(source)[1]

    def reads(self, source: str, name: str) -> bool:
        """Whether the template looks at the variable `name`."""
        return name in self._compiled(source)[2]

    def _compile(self, source: str) -> tuple[jinja2.Template, bool, frozenset[str]]:
        if len(source) > _MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequestError(
                f"the chat template has more than {_MAX_TEMPLATE_CHARACTERS} characters", param="chat_template"
            )

        def compile_source() -> tuple[jinja2.Template, bool, frozenset[str]]:
            tokens = sum(kind != "whitespace" for _, kind, _ in self._environment.lex(source))
            if tokens > _MAX_TEMPLATE_TOKENS:
                raise InvalidRequestError(
                    f"the chat template has more than {_MAX_TEMPLATE_TOKENS} tokens", param="chat_template"
                )
            self._environment.budget.start()
            tree = self._environment.parse(source)
            if _nesting(tree) > _MAX_NESTING:
                raise InvalidRequestError("the chat template nests expressions too deeply", param="chat_template")
            names = frozenset(jinja2.meta.find_undeclared_variables(tree))
            return self._environment.from_string(tree), _loops_over_content(tree), names

        compiled: tuple[jinja2.Template, bool, frozenset[str]] = self._guarded(compile_source)
        return compiled

    def _joined(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        for name, value in variables.items():
            if size_of(value) > MAX_VALUE_BYTES:
                raise InvalidRequestError(f"{name} takes more than {MAX_VALUE_BYTES >> 20} MB", param=name)
        budget = self._environment.budget
        budget.start()
        pieces, size = [], 0
        for piece in template.root_render_func(template.new_context(dict(variables))):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_VALUE_BYTES:
                raise InvalidRequestError(f"the chat template writes more than {MAX_VALUE_BYTES >> 20} MB")
            budget.spend()
        return "".join(pieces)

    def _guarded(self, work: Any) -> Any:
        try:
            return work()
        except InvalidRequestError:
            raise
        except RecursionError:
            raise InvalidRequestError("the chat template failed: it nests too deeply", param="messages") from None
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template is not valid, line {error.lineno}: {_brief(error)}"
            raise InvalidRequestError(message, param="chat_template") from None
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise InvalidRequestError(f"the chat template failed: {_brief(error)}", param="messages") from None


def _brief(error: Exception) -> str:
    text = error.message if isinstance(error, jinja2.TemplateError) else str(error)
    text = _ADDRESS.sub("", text or type(error).__name__)
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[:_MAX_MESSAGE_CHARACTERS] + "..."


def _nesting(node: jinja2.nodes.Node, depth: int = 0) -> int:
    """The squares of the depths, within their statements, of all expressions."""
    depth = 0 if isinstance(node, jinja2.nodes.Stmt) else depth + 1
    return depth * depth + sum(_nesting(child, depth) for child in node.iter_child_nodes())


def _reads_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, jinja2.nodes.Getitem) and getattr(node.arg, "value", None) == "content"


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether some loop goes over `x.content`, over a name set to it, or over a name `content`."""
    names = {"content"}
    for assign in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assign.target, jinja2.nodes.Name) and _reads_content(assign.node):
            names.add(assign.target.name)

    def is_content(node: jinja2.nodes.Node) -> bool:
        if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
            return is_content(node.node)  # the filter that counts a loop's steps, or one of the template
        return _reads_content(node) or (isinstance(node, jinja2.nodes.Name) and node.name in names)

    return any(is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))
