"""A private copy of the source tree, from which each process that the tests start imports quire."""

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from scripts.mutation.faults import Fault

PLUGIN = "quire_mutation_plugin"
"""The name under which pytest finds `pytest_plugin.py` in the root of a copy."""
_BUILT = ("build", "dist")
# In the root of the copy and in its src, one of which is in PYTHONPATH even where a test sets that anew. Python imports
# it after the .pth files, one of which puts the finder of an editable install before sys.path.
_START = """\
import sys

sys.dont_write_bytecode = True
sys.meta_path[:] = [
    finder for finder in sys.meta_path if not all(word in type(finder).__module__ for word in ("editable", "quire"))
]
sys.path.insert(0, {source!r})
"""
_ASK = "import {modules}; print(*(module.__file__ for module in ({modules},)), sep='\\n')"
_ASK_CHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"


def native_extension() -> Path | None:
    """The compiled module that this Python would import, wherever it lies; None if it was not built."""
    spec = find_spec("quire.ops._native")
    return None if spec is None or spec.origin is None else Path(spec.origin)


class TreeCopy:
    """A copy of the tree `source` in the new folder `root`, with the compiled module `native`, if there is one.

    Bytecode is checked by the hash of its source, not by time and size: a fault may leave both as they are.
    """

    def __init__(self, source: Path, root: Path, native: Path | None) -> None:
        self.root = root

        def left_out(folder: str, names: list[str]) -> set[str]:
            top = {name for name in names if name.startswith(".") or name in _BUILT} if folder == str(source) else set()
            return top | {name for name in names if name == "__pycache__" or name.endswith((".so", ".pyd"))}

        shutil.copytree(source, root, symlinks=True, ignore=left_out)
        if native is not None:
            shutil.copy2(native, root / "src/quire/ops" / native.name)
        shutil.copyfile(Path(__file__).with_name("pytest_plugin.py"), root / f"{PLUGIN}.py")
        for folder in (root, root / "src"):
            (folder / "sitecustomize.py").write_text(_START.format(source=str(root / "src")), encoding="utf-8")
        hashed = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root / "src", quiet=2, invalidation_mode=hashed)
        modules = ["quire"] if native is None else ["quire", "quire.ops._native"]
        self._require_own(modules)

    @property
    def environment(self) -> dict[str, str]:
        """Of the processes that run the tests. `CI` makes hypothesis draw the same examples each time."""
        paths = [str(self.root), str(self.root / "src"), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CI": "1",
        }

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """The copy has the fault while this is entered."""
        path = self.root / fault.file
        sound = path.read_bytes()
        path.write_bytes(fault.applied_to(sound.decode()).encode())
        try:
            yield
        finally:
            path.write_bytes(sound)

    def _require_own(self, modules: list[str]) -> None:
        """Raises RuntimeError unless a process, and a process that it starts, import the modules from the copy."""
        question = _ASK.format(modules=", ".join(modules))
        for command in (["-c", question], ["-c", _ASK_CHILD, question]):
            done = subprocess.run(
                [sys.executable, *command], cwd=self.root, env=self.environment, capture_output=True, text=True
            )
            found = done.stdout.split("\n")[:-1]
            own = str(self.root.resolve())
            if done.returncode or not all(str(Path(name).resolve()).startswith(own) for name in found):
                raise RuntimeError(f"tests in the copy would not import it: {found} {done.stderr}")
