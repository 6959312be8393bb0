"""Law 6: every optional folder of `src/quire` can be deleted. Without it the smallest engine passes its tests, and what
needed it is refused by the name of the argument."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from scripts.house.import_law import LAW
from scripts.house.tree import ROOT
from scripts.mutation.tree_copy import TreeCopy, native_extension

OPTIONAL = {
    "isolation": ("LLM(core_process=True)", "core_process"),
    "observe": ("AsyncLLM(max_num_seqs=1).observer.trace_to('http://127.0.0.1:1', 'm')", "otlp_traces_endpoint"),
    "demo": ("LLM()", "model"),
    "bench": None,
    "build": None,
    "plan": None,
    "server": None,
    "structured": None,
    "cli": None,
    "course": None,
    "programs": None,
}
"""Folder -> what cannot be had without it, and the argument that is named."""
SAY_FIELD = """
from quire import LLM, AsyncLLM
from quire.errors import ConfigurationError
try:
    {call}
except ConfigurationError as error:
    print(error.field)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    return TreeCopy(ROOT, tmp_path_factory.mktemp("deletable") / "tree", native_extension())


@contextmanager
def without(tree: TreeCopy, folders: tuple[str, ...]) -> Iterator[None]:
    package, aside = tree.root / "src/quire", tree.root.parent / "aside"
    aside.mkdir(exist_ok=True)
    for folder in folders:
        (package / folder).rename(aside / folder)
    try:
        yield
    finally:
        for folder in folders:
            (aside / folder).rename(package / folder)


def run(tree: TreeCopy, *arguments: str) -> str:
    """The output of a Python process in the copy; it must end well."""
    command = [sys.executable, *arguments]
    environment = {**tree.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "folders",
    [
        ("isolation",),
        ("observe",),
        ("structured",),
        ("bench", "build", "cli", "course", "demo", "plan", "programs", "server"),
    ],
    ids="-".join,
)
def test_the_smallest_engine_needs_no_optional_folder(tree: TreeCopy, folders: tuple[str, ...]) -> None:
    with without(tree, folders):
        shown = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tiny")
    assert " passed" in shown and "skipped" not in shown


@pytest.mark.parametrize("folder", [folder for folder, found in OPTIONAL.items() if found is not None])
def test_what_needs_a_deleted_folder_is_refused_by_name(tree: TreeCopy, folder: str) -> None:
    call, field = OPTIONAL[folder] or ("", "")
    with without(tree, (folder,)):
        assert run(tree, "-c", SAY_FIELD.format(call=call)).split() == [field]


def test_the_list_is_what_no_other_folder_may_import() -> None:
    """An engine, `compose` and the executors stay."""
    folders = {path.parent.name for path in (ROOT / "src/quire").glob("*/__init__.py")}
    needed = {name.split(".")[0] for folder in LAW if folder.split(".")[0] not in OPTIONAL for name in LAW[folder].own}
    assert folders - needed - {"compose", "engine", "executor"} == set(OPTIONAL)


def test_a_server_can_do_without_its_store(tree: TreeCopy) -> None:
    """What it then says of what is asked to be kept: `tests/server/test_responses_client.py`."""
    folder, aside = tree.root / "src/quire/server/store", tree.root.parent / "store"
    folder.rename(aside)
    try:
        modules = "quire.cli.serve, quire.server.http.app, quire.server.doors.openai.routes"
        assert run(tree, "-c", f"import {modules}; print('good')").split() == ["good"]
    finally:
        aside.rename(folder)
