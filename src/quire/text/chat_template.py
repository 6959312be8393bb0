"""Rendering chat templates: `transformers`' rules, inside a sandbox with bounds on time and memory."""

import functools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes

from quire.errors import InvalidRequestError
from quire.text.template_limits import MAX_VALUE_BYTES, weigh
from quire.text.template_sandbox import TemplateEnvironment

_MAX_TEMPLATE_CHARACTERS = 256 << 10
_MAX_TEMPLATE_TOKENS = 16 << 10  # compiling takes some 40 microseconds and 3 KB for each; large templates have 6,000
_MAX_COMPILED = 8
_MAX_DEPTH = 64
_MAX_MESSAGE_CHARACTERS = 300
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names clients use; templates read the first two
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
        """The text of a template. `variables` must be plain data, see `plain_data`."""
        template, _ = self._compiled(source)
        text: str = self._guarded(lambda: self._joined(template, variables))
        return text

    def iterates_content(self, source: str) -> bool:
        """Whether the template takes a message's content as a list of parts, not only as a string."""
        return self._compiled(source)[1]

    def _compile(self, source: str) -> tuple[jinja2.Template, bool]:
        if len(source) > _MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequestError(
                f"the chat template has more than {_MAX_TEMPLATE_CHARACTERS} characters", param="chat_template"
            )

        def compile_source() -> tuple[jinja2.Template, bool]:
            tokens = sum(kind != "whitespace" for _, kind, _ in self._environment.lex(source))
            if tokens > _MAX_TEMPLATE_TOKENS:
                raise InvalidRequestError(
                    f"the chat template has more than {_MAX_TEMPLATE_TOKENS} tokens", param="chat_template"
                )
            self._environment.meter.begin()
            tree = self._environment.parse(source)
            return self._environment.from_string(tree), _loops_over_content(tree)

        compiled: tuple[jinja2.Template, bool] = self._guarded(compile_source)
        return compiled

    def _joined(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        for name, value in variables.items():
            if weigh(value) > MAX_VALUE_BYTES:
                raise InvalidRequestError(f"{name} takes more than {MAX_VALUE_BYTES >> 20} MB", param=name)
        meter = self._environment.meter
        meter.begin()
        pieces, size = [], 0
        for piece in template.root_render_func(template.new_context(dict(variables))):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_VALUE_BYTES:
                raise InvalidRequestError(f"the chat template writes more than {MAX_VALUE_BYTES >> 20} MB")
            meter.charge()
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


def _reads_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, jinja2.nodes.Getitem)
        and isinstance(node.arg, jinja2.nodes.Const)
        and node.arg.value == "content"
    )


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


def plain_data(value: Any, *, depth: int = 0) -> Any:
    """A copy of JSON-like data made of exact built-in types, so that a template finds no other methods.

    Raises `InvalidRequestError` for anything else, and for data nested more than 64 levels deep.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"the messages nest deeper than {_MAX_DEPTH} levels", param="messages")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, depth=depth + 1) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    raise InvalidRequestError(f"messages cannot hold a value of type {type(value).__name__}", param="messages")


def read_messages(messages: Any, *, keeps_parts: bool) -> list[dict[str, Any]]:
    """Messages as a template takes them.

    Keys whose value is None are dropped, a message's reasoning is given under each of its names, and
    content in parts becomes one string, a line for each part, unless `keeps_parts`.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message", param="messages")
    result = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{place}] must be an object with role and content", param="messages")
        plain = {key: item for key, item in plain_data(message).items() if item is not None}
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        if isinstance(plain.get("content"), list):
            parts = [_text_part(part, place) for part in plain["content"]]
            plain["content"] = plain["content"] if keeps_parts else "\n".join(parts)
        result.append(plain)
    return result


def _text_part(part: Any, place: int) -> str:
    if isinstance(part, str):
        return part
    kind = type(part).__name__
    if isinstance(part, dict):
        kind, text = str(part.get("type")), part.get("text")
        if kind == "text" and isinstance(text, str):
            return text
    raise InvalidRequestError(
        f"messages[{place}].content: parts must be of type 'text' with a string, not {kind[:40]!r}",
        param="messages",
    )


def strings_in(value: Any) -> Iterator[str]:
    """Every string in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


class OpenEnd:
    """Leaves the last message open (`continue_final_message`): marks its end, and cuts the text there."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._mark = secrets.token_hex(16)
        last = messages[-1]
        content = last.get("content")
        # The space shows whether the template trims what it is given.
        if isinstance(content, str):
            last["content"] = content + self._mark + " "
            self._text = content
        elif isinstance(content, list) and content:
            part = content[-1]
            self._text = part if isinstance(part, str) else part["text"]
            marked = self._text + self._mark + " "
            content[-1] = marked if isinstance(part, str) else {**part, "text": marked}
        else:
            raise InvalidRequestError("continue_final_message: the last message has no content", param="messages")

    def cut(self, rendered: str) -> str:
        """The rendered text up to the end of the last message."""
        place = rendered.rfind(self._mark)
        if place < 0 or self._text.strip() not in rendered:
            raise InvalidRequestError(
                "continue_final_message: the chat template does not keep the last message as it is", param="messages"
            )
        keeps_space = rendered.startswith(" ", place + len(self._mark))
        return rendered[:place] if keeps_space else rendered[:place].rstrip()
