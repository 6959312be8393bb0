"""requirements/*.txt: each package that an install, an image, the tests or a release takes, with version and hashes.

python -m scripts.lock          makes them anew, with the newest versions that pyproject.toml allows
python -m scripts.lock --check  exits 1 when one does not hold what pyproject.toml and requirements/*.in ask for

`uv` resolves, for every Python and platform at once (`pip install uv`). No file names an index: the one that pip is set
to is asked.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
SOURCES: dict[str, list[str]] = {
    "base.txt": ["pyproject.toml"],
    "test.txt": ["pyproject.toml", "--extra", "test"],
    "build.txt": ["requirements/build.in"],
    "release.txt": ["requirements/release.in"],
}
OPTIONS = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate", "--quiet")
HEAD = "# Made by `python -m scripts.lock`: pip install --require-hashes -r requirements/{name}\n"
_NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)", re.M)
_HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$", re.M)


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, int]:
    """Package -> how many hashes stand with it, the fewest of its entries."""
    found: dict[str, int] = {}
    for entry in re.split(r"\n(?=\S)", text):
        match = _NAME.match(entry)
        if match is not None and "==" in entry:
            name = canonical(match[1])
            found[name] = min(found.get(name, 2**31), len(_HASH.findall(entry)))
    return found


def wanted(name: str) -> set[str]:
    """The packages that a file's source asks for itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if SOURCES[name][0] != "pyproject.toml":
        lines = (ROOT / SOURCES[name][0]).read_text(encoding="utf-8").splitlines()
    else:
        lines = [*project["dependencies"], *(project["optional-dependencies"]["test"] if "test" in name else [])]
    return {canonical(match[1]) for line in lines if (match := _NAME.match(line))}


def problems() -> list[str]:
    """What is wrong with the files."""
    found = []
    for name in SOURCES:
        path = FOLDER / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        packages = locked(text)
        found += [f"{name}: {package} is not in it" for package in sorted(wanted(name) - packages.keys())]
        found += [f"{name}: {package} has no hash" for package, count in packages.items() if not count]
        if re.search(r"https?://|--(extra-)?index-url|--find-links|-f ", text):
            found.append(f"{name}: it names where packages are from")
    return found


def main() -> int:
    """Make, or check."""
    if "--check" not in sys.argv[1:]:
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        for name, source in SOURCES.items():
            command = [uv, "pip", "compile", *OPTIONS, *source]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            (FOLDER / name).write_text(HEAD.format(name=name) + done.stdout, encoding="utf-8")
    found = problems()
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
