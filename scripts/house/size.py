"""The size of the base install: a fresh environment, the wheel of this tree, and everything that it needs.

Counted: every file of that environment's site-packages, byte-compiled files included, as `pip` leaves it.
The environment has no pip of its own, so nothing has to be subtracted. MB are 10**6 bytes.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.house.tree import Report

NOT_IN_BASE = ("torch", "transformers", "triton", "ray", "pandas", "scipy")
BUILT_FROM = ("pyproject.toml", "CMakeLists.txt")


def check_size(root: Path) -> Report:
    """Measure once for each state of what decides the size; remember it in build/size."""
    if not (root / "CMakeLists.txt").exists() or not (root / "src/quire/__init__.py").exists():
        return Report("the package cannot be built yet: not measured")
    limit = tomllib.loads((root / "scripts/budget.toml").read_text(encoding="utf-8"))["install"]["base_mb"]
    record = root / "build" / "size" / f"{_state(root)}.json"
    if record.exists():
        measured: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        when = "measured before, nothing changed since"
    else:
        measured = measure(root)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(measured, indent=1), encoding="utf-8")
        when = "measured now"
    return Report(f"{describe(measured['bytes'])} ({when}; budget {limit} MB)", judge(measured, limit))


def judge(measured: dict[str, Any], limit_mb: float) -> list[str]:
    """Breaches of a measurement: too large, or something that belongs to an extra."""
    total_mb = sum(measured["bytes"].values()) / 1e6
    breaches = [f"base install: {total_mb:.1f} MB, the budget is {limit_mb} MB"] if total_mb > limit_mb else []
    return breaches + [f"the base install pulls in {name}" for name in measured["unwanted"]]


def describe(sizes: dict[str, int]) -> str:
    """The total and its five largest parts."""
    largest = Counter(sizes).most_common(5)
    parts = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in largest)
    return f"base install {sum(sizes.values()) / 1e6:.1f} MB: {parts}, {len(sizes) - len(largest)} smaller"


def _state(root: Path) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in BUILT_FROM:
        digest.update((root / name).read_bytes())
    for path in sorted((root / "src/quire/demo").rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def measure(root: Path) -> dict[str, Any]:
    """Build the wheel, install it into a fresh environment, run it there, and add up the files."""
    with tempfile.TemporaryDirectory(prefix="quire-size-") as scratch:
        folder = Path(scratch)
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-q",
                "--no-deps",
                "--no-build-isolation",
                "-w",
                scratch,
                ".",
            ],
            root,
        )
        wheel = next(folder.glob("*.whl"))
        environment = folder / "environment"
        _run([sys.executable, "-m", "venv", "--without-pip", str(environment)], folder)
        python = environment / "bin" / "python"
        _run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", str(wheel)], folder)
        _run([str(python), "-c", "import quire; quire.__version__"], folder)
        if (root / "src/quire/demo/model/config.json").exists():
            # What the base install promises: it answers, with nothing but its own dependencies.
            _run([str(environment / "bin/quire"), "generate", "What is PagedAttention?"], folder)
        purelib = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
        sizes = _sizes(Path(purelib))
        unwanted = [name for name in NOT_IN_BASE if (Path(purelib) / name).exists()]
        shutil.rmtree(environment)
    return {"bytes": sizes, "unwanted": unwanted}


def _sizes(site_packages: Path) -> dict[str, int]:
    """Bytes by top-level name; `numpy`, `numpy.libs` and `numpy-2.dist-info` are one."""
    sizes: Counter[str] = Counter()
    for path in site_packages.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(site_packages).parts[0]
            sizes[top.split("-")[0].split(".")[0]] += path.stat().st_size
    return dict(sizes)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
