"""What docstrings owe a reader: shapes of arrays, exceptions that are raised, more than three words."""

import ast
import re
from collections.abc import Container, Iterator
from pathlib import Path

from scripts.house.tree import Report, Source, python_files

FOLDERS = ("ops", "models", "runner", "sampling", "weights", "quant")
"""Packages of src/quire whose public functions are checked. The root's own files are too: they are the public face."""
ARRAYS = re.compile(r"\b(Array|NDArray)\b")
SHAPE = re.compile(r"\[[a-z0-9_*.][^\]\n]*\]|scalar|one-dimensional|same shape|in place")
LEAST_WORDS = 4
Function = ast.FunctionDef | ast.AsyncFunctionDef


def check_docstrings(root: Path) -> Report:
    """Public functions and classes of the checked packages and of the root."""
    sources = [source for folder in FOLDERS for source in python_files(root, f"src/quire/{folder}")]
    sources += [source for source in python_files(root, "src/quire") if source.path.count("/") == 2]
    contracts = {name for source in sources for name in protocol_methods(source)}
    breaches = [breach for source in sources for breach in docstring_breaches(source, contracts)]
    return Report(f"docstrings of {len(sources)} files", breaches)


def protocol_methods(source: Source) -> set[str]:
    """Names of the methods that the file's protocols declare: shapes stand there, and not with each implementation."""
    return {
        item.name
        for node in source.syntax.body
        if isinstance(node, ast.ClassDef) and _is_protocol(node)
        for item in node.body
        if isinstance(item, Function)
    }


def _is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)


def docstring_breaches(source: Source, contracts: Container[str] = ()) -> list[str]:
    """What is missing in one file. `contracts`: methods whose shapes a protocol states."""
    breaches = []
    lines = source.text.splitlines()
    protocols = {
        f"{node.name}." for node in source.syntax.body if isinstance(node, ast.ClassDef) and _is_protocol(node)
    }
    for node, owner, doc in _public(source.syntax):
        stated = node.name in contracts and owner not in protocols
        at = f"{source.path}:{node.lineno} {owner}{node.name}"
        if not isinstance(node, ast.ClassDef):
            about = doc + "\n".join(lines[node.lineno - 1 : node.body[0].lineno])
            if not stated and ARRAYS.search(_signature(node)) and not SHAPE.search(about):
                breaches.append(f"{at}: arrays without shapes")
            breaches += [f"{at}: raises {name}, which its docstring leaves out" for name in _raised(node, doc)]
        if doc and not stated and len(doc.split()) < LEAST_WORDS:
            breaches.append(f"{at}: a docstring of {len(doc.split())} words")
    return breaches


def _public(module: ast.Module) -> Iterator[tuple[ast.ClassDef | Function, str, str]]:
    """Public classes and functions: the node, its class with a dot, and its docstring with that of its class."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node, "", ast.get_docstring(node) or ""
            for item in node.body:
                if isinstance(item, Function) and not item.name.startswith("_"):
                    yield item, f"{node.name}.", ast.get_docstring(item) or ""
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield node, "", ast.get_docstring(node) or ""


def _signature(node: Function) -> str:
    arguments = node.args
    annotations = [one.annotation for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return " ".join(ast.unparse(one) for one in (*annotations, node.returns) if one is not None)


def _raised(node: Function, doc: str) -> list[str]:
    """Exceptions of `raise` statements in the function itself that its docstring does not name."""
    names = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Raise) and item.exc is not None:
            raised = item.exc.func if isinstance(item.exc, ast.Call) else item.exc
            name = ast.unparse(raised).rsplit(".", 1)[-1]
            if name[:1].isupper() and name not in ("NotImplementedError", "AttributeError"):
                names.add(name)
    return sorted(name for name in names if name not in doc)
