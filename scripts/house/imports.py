"""The import law, checked with `ast`: imports inside functions count, save optional third-party ones."""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.house.import_law import BASE, COMPOSERS, FORBIDDEN_BELOW_PURE, LAW, PURE, TRANSITIVE, Room
from scripts.house.tree import Report, Source, python_files

PACKAGE = "quire"


@dataclass(frozen=True)
class Import:
    """One imported module, at one line of one file."""

    module: str
    line: int
    in_function: bool
    for_types: bool
    """Under `if TYPE_CHECKING`."""
    names: tuple[str, ...] = ()


def imports_of(source: Source, known: frozenset[str] = frozenset()) -> list[Import]:
    """The imports of a file. `from quire.core import plan` names `quire.core.plan` if that is in `known`."""
    return list(_visit(source.syntax.body, source, known, in_function=False, for_types=False))


def _visit(
    body: Iterable[ast.AST], source: Source, known: frozenset[str], *, in_function: bool, for_types: bool
) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names = _taken_from(alias.asname or alias.name, source)
                yield Import(alias.name, node.lineno, in_function, for_types, names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from(node, source, known, in_function, for_types)
        elif isinstance(node, ast.Call) and (target := _dynamic(node)):
            yield Import(target, node.lineno, in_function, for_types)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _visit(node.body, source, known, in_function=in_function, for_types=True)
            yield from _visit(node.orelse, source, known, in_function=in_function, for_types=for_types)
            continue
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _visit(ast.iter_child_nodes(node), source, known, in_function=inside, for_types=for_types)


def _taken_from(name: str, source: Source) -> tuple[str, ...]:
    """The attributes that a file takes from a module it imports by `name`."""
    taken = {node.attr for node in source.nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name}
    return tuple(sorted(taken))


def _from(
    node: ast.ImportFrom, source: Source, known: frozenset[str], in_function: bool, for_types: bool
) -> Iterator[Import]:
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        if not source.path.endswith("__init__.py"):
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *([base] if base else [])])
    values = []
    for alias in node.names:
        if f"{base}.{alias.name}" in known:
            yield Import(f"{base}.{alias.name}", node.lineno, in_function, for_types)
        else:
            values.append(alias.name)
    if values:
        yield Import(base, node.lineno, in_function, for_types, tuple(values))


def _dynamic(node: ast.Call) -> str | None:
    """The target of `importlib.import_module("...")` or `__import__("...")`."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("import_module", "__import__") and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
    return None


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _within(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def _room_of(module: str) -> str | None:
    """The room of an own module (`ops.cuda` before `ops`), a composer's name, or None: no row in the law."""
    inner = module.removeprefix(PACKAGE).lstrip(".")
    top = inner.split(".")[0]
    rooms = [room for room in LAW if _within(inner, [room])]
    return max(rooms, key=len, default=top if top in COMPOSERS else None)


def _fault(item: Import, room_name: str) -> str | None:
    """Why this import breaks the law, or None."""
    top = item.module.split(".")[0]
    if top == PACKAGE:
        return _own_fault(item, room_name)
    if top in sys.stdlib_module_names or item.for_types:
        return None
    room = LAW.get(room_name, Room(third_party=BASE | TRANSITIVE))
    if top in room.third_party:
        return None
    if item.in_function and room.optional and top not in BASE | TRANSITIVE:
        return None
    return f"{room_name or PACKAGE} may not import {top}"


def _own_fault(item: Import, room_name: str) -> str | None:
    target = item.module.removeprefix(PACKAGE).lstrip(".")
    if room_name not in COMPOSERS:
        allowed = LAW[room_name].own | {room_name}
        if not target and item.names == ("__version__",):
            return None
        if not _within(target, allowed):
            return f"{room_name} may not import {item.module}"
    target_room = _room_of(item.module)
    if target_room is not None and not _within(target_room, [room_name]):
        private = [part for part in [*target.split("."), *item.names] if _is_private(part)]
        if private:
            return f"{private[0]} is private to {item.module}"
    return None


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def check_imports(root: Path) -> Report:
    """Every file of `root/src/quire` against the table, and `core` against what it must never reach."""
    sources = python_files(root, f"src/{PACKAGE}")
    known = frozenset(source.module for source in sources)
    graph = {source.module: imports_of(source, known) for source in sources}
    breaches = []
    count = 0
    for source in sources:
        room_name = _room_of(source.module)
        if room_name is None:
            breaches.append(f"{source.path}: no row for it in scripts/house/import_law.py")
            continue
        for item in graph[source.module]:
            count += 1
            fault = _fault(item, room_name)
            if fault:
                breaches.append(f"{source.path}:{item.line}: {fault}")
    breaches += _impure_paths(graph)
    return Report(f"{count} imports in {len(sources)} files, against the table", breaches)


def _impure_paths(graph: dict[str, list[Import]]) -> list[str]:
    """The paths by which a module of `core` reaches what the pure floor must not, shortest first.

    Loading `a.b.c` also runs `a/__init__.py` and `a/b/__init__.py`: of those, imports at module level count.
    """
    starts = [module for module in graph if _within(module, [f"{PACKAGE}.{PURE}"])]
    paths: dict[str, tuple[str, ...]] = {module: (module,) for module in starts}
    queue = list(starts)
    whole = set(starts)
    breaches = []
    while queue:
        module = queue.pop(0)
        for item in graph[module]:
            if item.for_types or (item.in_function and module not in whole):
                continue
            top = item.module.split(".")[0]
            if top in FORBIDDEN_BELOW_PURE:
                breaches.append(" -> ".join([*paths[module], item.module]) + f" (line {item.line})")
            if item.module in graph and item.module not in whole:
                whole.add(item.module)
                paths[item.module] = (*paths[module], item.module)
                queue.append(item.module)
        for parent in _parents(module):
            if parent in graph and parent not in paths:
                paths[parent] = (*paths[module], parent)
                queue.append(parent)
    return sorted(set(breaches), key=lambda text: (text.count("->"), text))


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])
