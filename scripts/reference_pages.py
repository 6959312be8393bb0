"""The API reference, docs/reference/{python,programs,cli}.md, made from signatures, docstrings and the command line's
own flags.

python -m scripts.reference_pages          writes the pages
python -m scripts.reference_pages --check  exits 1 when one is not what it would write
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import quire
from quire import errors, programs
from quire.cli.main import VERBS, make_parser

FOLDER = Path(__file__).parents[1] / "docs/reference"
MADE = "<!-- Made by `python -m scripts.reference_pages` from src/quire: edit the docstrings there. -->\n"
SHARED = ("quire.outputs.RequestMetrics", "quire.outputs.Metric", "quire.outputs.Decision")
"""Classes that outputs hold, though `quire` does not export them."""
PARAMETERS = ("quire.sampling_params.RepetitionDetectionParams",)


def pages() -> dict[str, str]:
    """File name -> text, of every page."""
    return {"python.md": python_page(), "programs.md": programs_page(), "cli.md": cli_page()}


def python_page() -> str:
    """Every exported class, what their fields hold, and every exception."""
    names = [name for name in quire.__all__ if not name.startswith("_")]
    exported = [one for one in (getattr(quire, name) for name in names) if isinstance(one, type)]
    classes = exported + [_load(path) for path in (*PARAMETERS, *SHARED)]
    order = (
        "LLM",
        "AsyncLLM",
        "SamplingParams",
        "BeamSearchParams",
        "StructuredOutputsParams",
        "RequestOutputKind",
        "RepetitionDetectionParams",
        "EngineArgs",
    )
    classes.sort(key=lambda one: order.index(one.__name__) if one.__name__ in order else len(order))
    tree = (inspect.getdoc(errors) or "").partition("::\n\n")[2].partition("\n\n")[0]
    listed = [vars(errors)[name] for name, node in _classes(errors) if _is_error(vars(errors)[name])]
    return "\n".join(
        [
            "# Python reference\n",
            MADE,
            "Everything that `import quire` offers, and what its outputs hold. "
            "The flags of the command line: [cli](cli.md). HTTP: [the API](../guide/api.md). "
            "`quire.program` and what goes with it: [programs](programs.md).\n",
            *(_class_section(one) for one in classes),
            "## Errors\n",
            "All are in `quire.errors`.\n",
            f"```\n{textwrap.dedent(tree)}\n```\n",
            *(f"- **`{one.__name__}`**: {_flat(one.__doc__)}" for one in listed),
            "",
        ]
    )


def programs_page() -> str:
    """Every public name of `quire.programs`: functions, then classes."""
    found = [getattr(programs, name) for name in programs.__all__]
    functions = [one for one in found if not isinstance(one, type)]
    return "\n".join(
        [
            "# Programs: reference\n",
            MADE,
            "What `from quire.programs import ...` offers; `quire.program` is `program`. "
            "How it goes together: [programs](../guide/programs.md).\n",
            *(f"## {one.__name__}\n\n" + "\n".join(_function(one)) + "\n" for one in functions),
            *(_class_section(one) for one in found if isinstance(one, type)),
        ]
    )


def _function(one: Any) -> list[str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
    assert isinstance(node, ast.FunctionDef)
    return [_signature(node), _text(ast.get_docstring(node))]


def _load(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def _classes(module: Any) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node


def _is_error(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, errors.QuireError)


def _class_section(one: type) -> str:
    lines = [f"## {one.__name__}\n", f"`{one.__module__}.{one.__name__}`\n", _text(inspect.getdoc(one)), ""]
    found = _fields(one)
    if found:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_code(kind)} | {_code(default)} | {_flat(text)} |" for name, kind, default, text in found
        ]
        lines.append("")
    for node in _members(one):
        lines += [f"### {one.__name__}.{node.name}\n", *_member(node), ""]
    return "\n".join(lines)


def _member(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    doc = _text(ast.get_docstring(node))
    if any(ast.unparse(one) == "property" for one in node.decorator_list):
        return [f"`-> {ast.unparse(node.returns)}`\n" if node.returns else "", doc]
    arguments = node.args
    first = arguments.args.pop(0)  # self or cls
    assert first.arg in ("self", "cls"), node.name
    return [_signature(node), doc]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    written = list(_one_by_one(node.args))
    whole = f"{prefix}{node.name}({', '.join(written)}){result}"
    if len(whole) > 100:
        whole = f"{prefix}{node.name}(\n" + "".join(f"    {one},\n" for one in written) + f"){result}"
    return f"```python\n{whole}\n```\n"


def _one_by_one(arguments: ast.arguments) -> Iterator[str]:
    """Each parameter as it is written."""
    unset = [None] * (len(arguments.args) - len(arguments.defaults))
    for one, default in zip(arguments.args, [*unset, *arguments.defaults], strict=True):
        yield _parameter(one, default)
    if arguments.vararg is not None or arguments.kwonlyargs:
        yield f"*{ast.unparse(arguments.vararg) if arguments.vararg else ''}"
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(one, default)
    if arguments.kwarg is not None:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(one) + ("" if default is None else f" = {ast.unparse(default)}")


def _members(one: type) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public methods and properties, inherited ones of Quire's own bases included, in the order of the source."""
    found: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    for base in reversed(one.__mro__):
        if base.__module__.startswith("quire."):
            for item in dict(_classes(import_module(base.__module__)))[base.__name__].body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
                    found[item.name] = item
    return list(found.values())


def _fields(one: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and the docstring below it, of annotated names of the class body; members of an enum."""
    node = dict(_classes(import_module(one.__module__)))[one.__name__]
    found = []
    for index, item in enumerate(node.body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, kind = item.target.id, ast.unparse(item.annotation)
            default = "" if item.value is None else _default(item.value)
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            name, kind, default = item.targets[0].id, "", ast.unparse(item.value)
        else:
            continue
        if not name.startswith("_"):
            found.append((name, kind, default, _docstring_after(node.body, index)))
    return found


def _default(value: ast.expr) -> str:
    """Of `field(default=x)` or `field(default_factory=list)`, what it makes."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {item.arg: item.value for item in value.keywords}
        if "default" in given:
            return ast.unparse(given["default"])
        return f"{ast.unparse(given['default_factory'])}()" if "default_factory" in given else ""
    return ast.unparse(value)


def _docstring_after(body: list[ast.stmt], index: int) -> str:
    following = body[index + 1] if index + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return inspect.cleandoc(str(following.value.value))
    return ""


def cli_page() -> str:
    """Every verb with its flags; the groups that several verbs have come once, at the end."""
    parser = make_parser(list(VERBS))
    verbs = _choices(parser)
    shared: dict[str, list[argparse.Action]] = {}
    lines = [
        "# Command line reference\n",
        MADE,
        "`quire VERB ...`. Hyphen and underscore are both accepted in the name of a flag. "
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. In Python: [the library](python.md).\n",
    ]
    for name in VERBS:
        lines += [f"## quire {name}\n", f"{VERBS[name][0].upper()}{VERBS[name][1:]}.\n", *_flags(verbs[name], shared)]
        for kind, child in _choices(verbs[name]).items():
            lines += [f"### quire {name} {kind}\n", *_flags(child, shared)]
        examples = (verbs[name].epilog or "").strip()
        if examples:
            lines.append(f"```\n{examples}\n```\n")
    for title, actions in shared.items():
        lines += [f"## Flags of the {title}\n", *_table(actions)]
    return "\n".join(lines)


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:  # argparse has no public way to read a parser
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags(parser: argparse.ArgumentParser, shared: dict[str, list[argparse.Action]]) -> list[str]:
    """A table of the verb's own flags, and the names of the groups that it shares."""
    own: list[argparse.Action] = []
    groups = []
    for group in parser._action_groups:
        title, _, remark = (group.title or "").partition(" (")
        actions = group._group_actions
        if title in ("engine", "sampling"):
            known = {action.dest for action in shared.get(title, [])}
            shared.setdefault(title, []).extend(action for action in actions if action.dest not in known)
            groups.append(f"[{title}](#flags-of-the-{title})" + (f" ({remark}" if remark else ""))
        else:
            own += actions
    beside = [f"And the flags of the {' and of the '.join(groups)}.\n"] if groups else []
    return [*_table(own), *beside]


def _table(actions: list[argparse.Action]) -> list[str]:
    rows = []
    for action in actions:
        skipped = (argparse._HelpAction, argparse._SubParsersAction)
        if isinstance(action, skipped) or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = "" if not action.option_strings or action.nargs == 0 else _value(action)
        rows.append(f"| {names}{value} | {_flat((action.help or '').replace('%%', '%'))} |")
    return ["| flag | |", "|---|---|", *rows, ""] if rows else []


def _value(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return ""
    if action.metavar is not None:
        return f" {action.metavar if isinstance(action.metavar, str) else ' '.join(action.metavar)}"
    choices = r" \| ".join(map(str, action.choices or ()))
    return f" {choices or action.dest.upper()}"


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def _flat(text: str | None) -> str:
    """One line for a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def _text(doc: str | None) -> str:
    """A docstring in Markdown: its sections become bold words, their entries a list."""
    lines: list[str] = []
    inside = ""
    for line in (doc or "").splitlines():
        head = line.strip().removesuffix(":")
        if line.strip() in ("Args:", "Raises:", "Returns:", "Yields:"):
            inside = head
            lines += [f"**{head}**", ""]
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon else f"- {line.strip()}")
        elif inside and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            inside = "" if line.strip() else inside
            lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Write, or check."""
    made = pages()
    if "--check" not in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for name, text in made.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    stale = [name for name, text in made.items() if _written(name) != text]
    for name in stale:
        print(f"docs/reference/{name} is not what scripts.reference_pages writes: run it", file=sys.stderr)
    return 1 if stale else 0


def _written(name: str) -> str:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
