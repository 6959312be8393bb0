"""The budgets of scripts/budget.toml, counted with `ast`, and lines of code by folder."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.house.tree import Report, Source, native_files, python_files

ENVIRONMENT_NAME = re.compile(r"QUIRE_[A-Z0-9_]+")
NATIVE_ENVIRONMENT = re.compile(r'getenv\s*\(\s*"(QUIRE_[A-Z0-9_]+)"')
CONTAINERS = frozenset({"list", "dict", "set", "defaultdict", "Counter", "OrderedDict", "deque"})
DUSTBINS = ("utils.py", "util.py", "helpers.py", "misc.py")


def read_budget(root: Path) -> dict[str, Any]:
    """The numbers, by table."""
    return tomllib.loads((root / "scripts/budget.toml").read_text(encoding="utf-8"))


def check_budgets(root: Path, budget: dict[str, Any] | None = None) -> Report:
    """Count everything that has a budget."""
    budget = read_budget(root) if budget is None else budget
    lines = budget["lines"]
    sources = python_files(root, "src/quire")
    native = [(path, len(text.splitlines())) for path, text in native_files(root)]
    breaches = [
        *_file_sizes([(source.path, source.num_lines) for source in sources], lines["source_file"]),
        *_file_sizes(native, lines["native_file"]),
        *_file_sizes([(file.path, file.num_lines) for file in python_files(root, "tests")], lines["test_file"]),
        *_file_sizes([(file.path, file.num_lines) for file in python_files(root, "scripts")], lines["script_file"]),
    ]
    total = sum(source.num_lines for source in sources)
    total_native = sum(count for _, count in native)
    breaches += _over("src/quire", total, lines["source"], "lines of Python")
    breaches += _over("native", total_native, lines["native"], "lines of C++")
    for source in sources:
        breaches += _functions(source, lines["source_function"])
        breaches += _manners(source)
    breaches += _fields(sources, budget["fields"])
    breaches += _folders(root, budget.get("folders", {}))
    breaches += _methods(sources, budget.get("methods", {}))
    breaches += _spine(root, budget.get("spine", {}))
    variables = environment_variables(root, sources)
    breaches += _over(
        ", ".join(variables),
        len(variables),
        budget["names"]["environment_variables"],
        "environment variables",
    )
    return Report(
        f"{total} of {lines['source']} lines of Python, {total_native} of {lines['native']} of C++, "
        f"{len(variables)} of {budget['names']['environment_variables']} environment variables",
        breaches,
    )


def _over(what: str, count: int, limit: int, unit: str) -> list[str]:
    return [f"{what}: {count} {unit}, the budget is {limit}"] if count > limit else []


def _file_sizes(files: list[tuple[str, int]], limit: int) -> list[str]:
    return [breach for path, count in files for breach in _over(path, count, limit, "lines")]


def _functions(source: Source, limit: int) -> list[str]:
    breaches = []
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            breaches += _over(f"{source.path}:{node.lineno} {node.name}", count, limit, "lines")
    return breaches


def _manners(source: Source) -> list[str]:
    """No mixins, no module globals that are rebound or filled, no dustbin files."""
    breaches = []
    if source.path.rsplit("/", 1)[-1] in DUSTBINS:
        breaches.append(f"{source.path}: name the thing, not `{source.path.rsplit('/', 1)[-1]}`")
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Mixin"):
            breaches.append(f"{source.path}:{node.lineno}: class {node.name}: no mixins")
        if isinstance(node, ast.Global):
            breaches.append(f"{source.path}:{node.lineno}: global {', '.join(node.names)}: no globals that change")
        if isinstance(node, ast.Module):
            places = [item.lineno for item in node.body if _is_empty_container(item)]
            breaches += [f"{source.path}:{line}: an empty container: no globals that change" for line in places]
    return breaches


def _is_empty_container(statement: ast.stmt) -> bool:
    """A module's name for a container that can only be of use once something is put into it."""
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in CONTAINERS:
        return value.func.id == "defaultdict" or (not value.args and not value.keywords)
    return isinstance(value, ast.List | ast.Dict) and not (value.elts if isinstance(value, ast.List) else value.keys)


def _fields(sources: list[Source], limits: dict[str, int]) -> list[str]:
    breaches = []
    by_path = {source.path: source for source in sources}
    for place, limit in limits.items():
        path, class_name = place.split(":")
        if path not in by_path:
            continue
        names = class_fields(by_path[path], class_name)
        if names is None:
            breaches.append(f"{path}: no class {class_name}, which scripts/budget.toml counts")
        else:
            breaches += _over(place, len(names), limit, "fields")
    return breaches


def _folders(root: Path, limits: dict[str, int]) -> list[str]:
    """Lines by folder, so that what grows has to say so where it grows."""
    counts = {folder: lines for folder, _, lines in lines_by_folder(root) if folder.startswith("src/")}
    breaches = [f"{folder}: no budget in scripts/budget.toml" for folder in counts if limits and folder not in limits]
    return breaches + [
        one for folder, limit in limits.items() for one in _over(folder, counts.get(folder, 0), limit, "lines")
    ]


def _methods(sources: list[Source], limits: dict[str, int]) -> list[str]:
    """Methods of a class, private ones left out."""
    breaches = []
    by_path = {source.path: source for source in sources}
    for place, limit in limits.items():
        path, class_name = place.split(":")
        classes = [node for node in by_path[path].nodes if isinstance(node, ast.ClassDef)] if path in by_path else []
        bodies = [node.body for node in classes if node.name == class_name]
        if not bodies:
            breaches.append(f"{path}: no class {class_name}, which scripts/budget.toml counts")
        functions = [
            item for body in bodies for item in body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        breaches += _over(place, sum(not item.name.startswith("_") for item in functions), limit, "methods")
    return breaches


def spine(page: str) -> list[str]:
    """The files of the section "The reading spine" of docs/tour.md: the first code of each item of its list."""
    section = page.partition("## The reading spine\n")[2].partition("\n## ")[0]
    return re.findall(r"^\s*(?:-|\d+\.) `([^`]+)`", section, re.MULTILINE)


def _spine(root: Path, limits: dict[str, int]) -> list[str]:
    """The files that a reader of docs/tour.md is led through: they exist, and are few."""
    if not limits:
        return []
    paths = spine((root / "docs/tour.md").read_text(encoding="utf-8"))
    breaches = [f"docs/tour.md: the reading spine has no file {path}" for path in paths if not (root / path).is_file()]
    if len(paths) < limits["least_files"]:
        breaches.append(f"docs/tour.md: {len(paths)} files in the reading spine, at least {limits['least_files']}")
    texts = [(root / path).read_text(encoding="utf-8") for path in paths if (root / path).is_file()]
    return breaches + _over(
        "the reading spine", sum(len(text.splitlines()) for text in texts), limits["lines"], "lines"
    )


def class_fields(source: Source, class_name: str) -> set[str] | None:
    """What an object of the class carries: annotated names of its body and every `self.name = ...`."""
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            declared = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and "ClassVar" not in ast.unparse(item.annotation)
            }
            return declared | _assigned_to_self(node)
    return None


def _assigned_to_self(class_node: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(class_node)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def environment_variables(root: Path, sources: list[Source]) -> list[str]:
    """Distinct QUIRE_* names: any such string in Python, and arguments of `getenv` in C++."""
    names = {
        node.value
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ENVIRONMENT_NAME.fullmatch(node.value)
    }
    for _, text in native_files(root):
        names |= set(NATIVE_ENVIRONMENT.findall(text))
    return sorted(names)


def lines_by_folder(root: Path) -> list[tuple[str, int, int]]:
    """Folder, files and lines: each room of src/quire, then native, tests, scripts."""
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    counted = [
        (folder, file.path, file.num_lines)
        for folder in ("src/quire", "tests", "scripts")
        for file in python_files(root, folder)
    ]
    counted += [("native", path, len(text.splitlines())) for path, text in native_files(root)]
    for folder, path, count in counted:
        if folder == "src/quire":
            inner = path.removeprefix("src/quire/")
            folder = f"src/quire/{inner.split('/')[0]}" if "/" in inner else "src/quire (root)"
        files[folder] += 1
        lines[folder] += count
    return [(folder, files[folder], lines[folder]) for folder in files]
