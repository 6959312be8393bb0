"""What must not appear: deserialisers that run code, `eval`, and places that are not the project's."""

import ast
import re
import subprocess
from pathlib import Path

from scripts.house.tree import Report, Source, python_files

CODE_RUNNING_MODULES = frozenset(
    "pickle _pickle cPickle cloudpickle dill jsonpickle joblib marshal shelve pty telnetlib".split()
)
CODE_RUNNING_CALLS = frozenset(
    (
        "eval exec compile torch.load numpy.load np.load yaml.load yaml.unsafe_load torch.hub.load "
        "os.system tarfile.extractall runpy.run_path"
    ).split()
)
SAFE_ARGUMENT = {"numpy.load": "allow_pickle", "np.load": "allow_pickle"}
# Written in pieces, so that this file does not name them.
_PATHS = (r"(?<![\w.])/" + r"work(?![\w-])", "/opt/" + "wheels", "/opt/" + "pypi", r"(?<!\w)\.lib" + "rary/")
_HOSTS = (
    "py" + "pi",
    "python" + "hosted",
    "download.py" + "torch",
    "ana" + "conda",
    "npm" + "js",
    "cra" + "tes",
)
FOREIGN_PLACES = re.compile("|".join([*_PATHS, r"\b(?:" + "|".join(_HOSTS) + r")\.(?:org|com|io)\b"]))
"""Absolute paths of a workplace, and hosts of package registries: a clone must not depend on either."""
BINARY_SUFFIXES = (".safetensors", ".png", ".jpg", ".gif", ".ico", ".woff2", ".npz", ".gguf")


def check_forbidden(root: Path) -> Report:
    """Calls and modules in src, scripts and examples; strings in every tracked text file."""
    sources = [file for folder in ("src", "scripts", "examples") for file in python_files(root, folder)]
    breaches = [breach for source in sources for breach in dangerous_code(source)]
    paths = _tracked(root)
    for path in paths:
        breaches += foreign_places(path, (root / path).read_text(encoding="utf-8", errors="replace"))
    return Report(f"{len(sources)} files for code-running data, {len(paths)} for foreign places", breaches)


def dangerous_code(source: Source) -> list[str]:
    """Imports and calls that run data as code."""
    breaches = []
    for node in source.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.split(".")[0] in CODE_RUNNING_MODULES:
                    breaches.append(f"{source.path}:{node.lineno}: import of {name}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CODE_RUNNING_CALLS and not _made_safe(node, name):
                breaches.append(f"{source.path}:{node.lineno}: call of {name}")
            if any(_is_true(keyword, "trust_remote_code") for keyword in node.keywords):
                breaches.append(f"{source.path}:{node.lineno}: trust_remote_code=True")
    return breaches


def _made_safe(node: ast.Call, name: str) -> bool:
    """`numpy.load(..., allow_pickle=False)`."""
    return any(
        keyword.arg == SAFE_ARGUMENT.get(name)
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
        for keyword in node.keywords
    )


def _is_true(keyword: ast.keyword, name: str) -> bool:
    return keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def foreign_places(path: str, text: str) -> list[str]:
    """Lines that name a place outside the project."""
    if FOREIGN_PLACES.search(text) is None:
        return []
    return [
        f"{path}:{number}: names {found.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for found in [FOREIGN_PLACES.search(line)]
        if found
    ]


def _tracked(root: Path) -> list[str]:
    """The text files that a clone holds, new ones that are not ignored included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(path for path in listed if path and not path.endswith(BINARY_SUFFIXES) and (root / path).is_file())
