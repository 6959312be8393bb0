"""The public calls of the clients that the tests use, as the installed clients have them, and the route of each.

A call is named as it is written behind the client: `chat.completions.create`. Its route is read from the source of the
client; a helper that makes other calls has none.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

_VERBS = {"_get": "GET", "_post": "POST", "_delete": "DELETE", "_put": "PUT", "_patch": "PATCH", "_get_api_list": "GET"}
_METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD")
_NO_CALLS = ("close", "with_raw_response", "with_streaming_response")


@dataclass(frozen=True, slots=True)
class Client:
    """One client of a package.

    Args:
        resource: where its calls stand on objects below it: the class of these, as a module and a name.
        base: what its base URL adds to paths.
        headers: what its requests bear that decides where they go.
    """

    package: str
    name: str
    options: dict[str, str]
    resource: tuple[str, str] | None = None
    base: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """As it is imported."""
        return f"{self.package}.{self.name}"

    @property
    def version(self) -> str:
        """Of the installed package."""
        return version(self.package)


_KEY, _VERSION = {"api_key": "none"}, (("anthropic-version", "2023-06-01"),)
CLIENTS = {
    "openai": Client("openai", "OpenAI", _KEY, ("openai._resource", "SyncAPIResource"), "/v1"),
    "openai async": Client("openai", "AsyncOpenAI", _KEY, ("openai._resource", "AsyncAPIResource"), "/v1"),
    "anthropic": Client("anthropic", "Anthropic", _KEY, ("anthropic._resource", "SyncAPIResource"), headers=_VERSION),
    "anthropic async": Client(
        "anthropic", "AsyncAnthropic", _KEY, ("anthropic._resource", "AsyncAPIResource"), headers=_VERSION
    ),
    "ollama": Client("ollama", "Client", {}),
    "ollama async": Client("ollama", "AsyncClient", {}),
    "huggingface_hub": Client("huggingface_hub", "InferenceClient", {}),
    "huggingface_hub async": Client("huggingface_hub", "AsyncInferenceClient", {}),
}
"""By the name that `pytest.mark.client` gives."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and the requests that it is known to make, as methods and paths."""

    name: str
    function: Callable[..., Any]
    routes: tuple[tuple[str, str], ...]


@cache
def calls_of(name: str) -> dict[str, Call]:
    """Every call of a client, without those that another name stands for."""
    client = CLIENTS[name]
    base = None if client.resource is None else getattr(import_module(client.resource[0]), client.resource[1])
    found: dict[str, Call] = {}
    seen: set[Any] = set()
    every = dict(_methods(_instance(name), "", base))
    for call in sorted(every, key=lambda call: (call.startswith("beta."), call)):
        function = every[call]
        if function not in seen:
            seen.add(function)
            routes = tuple((verb, _whole(path, client.base)) for verb, path in _routes(function))
            found[call] = Call(call, function, routes)
    return found


def method_of(name: str, call: str) -> tuple[type, str]:
    """Whose method a call of a client is.

    Raises:
        AttributeError: the installed client has no such call.
    """
    *above, method = call.split(".")
    holder = _instance(name)
    for part in above:
        holder = getattr(holder, part)
    if not inspect.isfunction(inspect.getattr_static(type(holder), method)):
        raise AttributeError(f"{call} is no call of {CLIENTS[name].title}")
    return type(holder), method


@cache
def _instance(name: str) -> Any:
    client = CLIENTS[name]
    return getattr(import_module(client.package), client.name)(**client.options)


def _methods(instance: Any, prefix: str, base: type | None) -> Iterator[tuple[str, Callable[..., Any]]]:
    owner = type(instance)
    for name in dir(owner):
        if name.startswith("_") or name in _NO_CALLS:
            continue
        value = inspect.getattr_static(owner, name)
        if isinstance(value, (cached_property, property)):
            below = getattr(instance, name) if base is not None else None
            if base is not None and isinstance(below, base):
                yield from _methods(below, f"{prefix}{name}.", base)
        elif inspect.isfunction(value) and (prefix or base is None):
            yield prefix + name, value


def _whole(path: str, base: str) -> str:
    return (path if path.startswith("/v1/") else base + path).partition("?")[0]


@cache
def _definitions(file: str) -> dict[str, ast.AST]:
    """The functions of a file by their qualified names; of overloads the last, which is the one that is called."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for below in ast.iter_child_nodes(node):
            if isinstance(below, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + below.name] = below
                if isinstance(below, ast.ClassDef):
                    visit(below, f"{prefix}{below.name}.")

    visit(ast.parse(Path(file).read_text(encoding="utf-8")), "")
    return found


def _routes(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    plain: Any = inspect.unwrap(function)
    for node in ast.walk(_definitions(plain.__code__.co_filename)[plain.__qualname__]):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        texts = [_text(argument) for argument in node.args]
        if node.func.attr in _VERBS and texts and texts[0].startswith("/"):
            yield _VERBS[node.func.attr], texts[0]
        for verb, path in pairwise(texts):
            if verb in _METHODS and path.startswith("/"):
                yield verb, path


def _text(node: ast.AST) -> str:
    """A string, as far as it stands in the source."""
    if isinstance(node, ast.Call) and node.args:  # path_template("/files/{id}", id=id)
        return _text(node.args[0])
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
