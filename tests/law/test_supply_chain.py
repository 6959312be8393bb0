"""What others make comes by hash or by commit: packages, actions; and a release says what it is made of."""

import re
from pathlib import Path
from typing import Any

import yaml

from scripts import lock
from scripts.house.tree import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def steps(path: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [step for job in content["jobs"].values() for step in job["steps"]]


def test_every_locked_package_has_hashes_and_what_is_asked_for_is_there() -> None:
    assert lock.problems() == []
    base = lock.locked((lock.FOLDER / "base.txt").read_text(encoding="utf-8"))
    assert {"numpy", "tokenizers", "uvicorn"} <= base.keys() and base["numpy"] > 10, "a wheel for each platform"


def test_a_lock_that_lacks_something_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    for name in lock.SOURCES:
        (tmp_path / name).write_text((lock.FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    text = (tmp_path / "build.txt").read_text(encoding="utf-8")
    without_hash = re.sub(r"^(cmake==\S+) \\\n(?:    --hash.*\n)+", r"\1\n", text, flags=re.M)
    (tmp_path / "build.txt").write_text(without_hash.replace("nanobind==", "nanobound=="), encoding="utf-8")
    with (tmp_path / "release.txt").open("a", encoding="utf-8") as file:
        file.write("--index-url x\n")
    assert lock.problems() == [
        "build.txt: nanobind is not in it",
        "build.txt: cmake has no hash",
        "release.txt: it names where packages are from",
    ]


def test_every_action_is_named_by_commit() -> None:
    lines = [line.strip() for path in WORKFLOWS for line in path.read_text(encoding="utf-8").splitlines()]
    used = [line.removeprefix("- ") for line in lines if line.removeprefix("- ").startswith("uses:")]
    assert len(used) >= 8 and [line for line in used if not PINNED.fullmatch(line)] == []


def test_nothing_is_installed_in_a_workflow_or_an_image_without_a_hash() -> None:
    commands = [command for path in WORKFLOWS for step in steps(path) for command in step.get("run", "").splitlines()]
    commands += (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").split("&&")
    installs = [item.strip() for item in commands if re.search(r"\bpip (install|wheel|download)\b|\bpipx\b", item)]
    assert len(installs) >= 9
    ours = ("--require-hashes", "--no-deps", "--no-index", "dist/*.tar.gz")
    assert [item for item in installs if not any(word in item for word in ours)] == []


def test_a_release_says_what_it_is_made_of_and_asks_for_vulnerabilities() -> None:
    commands = [step.get("run", "") for step in steps(ROOT / ".github/workflows/wheels.yml")]
    uploads = [step.get("with", {}).get("path") for step in steps(ROOT / ".github/workflows/wheels.yml")]
    assert any("cyclonedx-py" in item and "sbom.cdx.json" in item for item in commands)
    assert any("pip-audit" in item for item in commands) and "sbom.cdx.json" in uploads
