"""The process that compiles first: bounded, kept, and no one else's fault."""

import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from quire.errors import InvalidRequestError
from quire.structured import checker as module
from quire.structured.checker import ShapeChecker
from quire.structured_params import StructuredOutputsParams


@pytest.fixture
def checker() -> Any:
    one = ShapeChecker()
    yield one
    one.close()


def test_answers_are_kept(checker: ShapeChecker) -> None:
    params = StructuredOutputsParams(json={"type": "integer"})
    source = checker.source(params)
    assert "integer" in source
    worker = checker._worker
    assert worker is not None
    worker.kill()
    worker.wait()
    assert checker.source(StructuredOutputsParams(json={"type": "integer"})) == source
    assert checker._worker is worker, "asked again"
    with pytest.raises(InvalidRequestError, match="unclosed") as first:
        checker.source(StructuredOutputsParams(regex="(a"))
    with pytest.raises(InvalidRequestError, match="unclosed") as second:
        checker.source(StructuredOutputsParams(regex="(a"))
    assert first.value is not second.value and str(first.value) == str(second.value)


def test_a_worker_that_dies_fails_its_request_alone(checker: ShapeChecker) -> None:
    checker.source(StructuredOutputsParams(regex="a"))
    worker = checker._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGKILL)
    os.kill(worker.pid, signal.SIGCONT)
    worker.wait()
    assert checker.source(StructuredOutputsParams(regex="b"))


def test_a_job_beyond_its_processor_time_is_refused(checker: ShapeChecker) -> None:
    """Beside it stands what an adversary sends; the request after it is served."""
    schema = {"enum": [f"{number:x}" * 3 for number in range(20_000)]}
    ladder: Any = {"type": "string", "pattern": "(a?){40}" * 40 + "b"}
    for values in ({"json": schema}, {"json": ladder}, {"regex": "(" * 4000 + "a" + ")" * 4000}):
        try:
            checker.source(StructuredOutputsParams(**values))
        except InvalidRequestError as error:
            assert error.param == "structured_outputs"
    assert checker.source(StructuredOutputsParams(choice=["still", "here"]))


@pytest.mark.parametrize("room", [2**22, 2**25])
def test_a_job_that_is_refused_memory_says_so(checker: ShapeChecker, room: int) -> None:
    """Where Python asks for it, and where the library does."""
    checker.source(StructuredOutputsParams(regex="a"))
    assert checker._worker is not None
    pid = checker._worker.pid
    used = int(re.findall(r"VmData:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024
    resource.prlimit(pid, resource.RLIMIT_DATA, (used + room, used + room))
    many = {"properties": {f"a{number}": {"type": "string", "minLength": number} for number in range(4500)}}
    with pytest.raises(InvalidRequestError, match="takes more than 1 GiB of memory to compile"):
        checker.source(StructuredOutputsParams(json=many))
    assert checker.source(StructuredOutputsParams(regex="b"))


def test_a_stuck_worker_is_ended(checker: ShapeChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker.source(StructuredOutputsParams(regex="a"))
    assert checker._worker is not None
    monkeypatch.setattr(module, "_LATEST_S", 0.3)
    os.kill(checker._worker.pid, signal.SIGSTOP)
    with pytest.raises(InvalidRequestError, match="stuck"):
        checker.source(StructuredOutputsParams(regex="b"))
    monkeypatch.undo()
    assert checker.source(StructuredOutputsParams(regex="b")), "being stuck is not kept"
    assert checker.source(StructuredOutputsParams(regex="c"))


def test_what_is_kept_is_bounded(checker: ShapeChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 2000)
    for number in range(20):
        checker.source(StructuredOutputsParams(regex=f"a{number}"))
    assert checker._kept_bytes <= 2000 and 0 < len(checker._kept) < 20


def test_the_working_directory_is_no_place_to_import_from(
    checker: ShapeChecker, tmp_path: Path, monkeypatch: Any
) -> None:
    """A file there that is called like a module of Python's is not run."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    (tmp_path / "quire").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checker.source(StructuredOutputsParams(regex="a"))


def test_what_is_known_is_known_by_what_it_says(checker: ShapeChecker) -> None:
    assert not checker.knows(StructuredOutputsParams(choice=["a", "b"]))
    checker.source(StructuredOutputsParams(choice=["a", "b"]))
    assert checker.knows(StructuredOutputsParams(choice=["a", "b"]))
    assert not checker.knows(StructuredOutputsParams(choice=["a"]))


@pytest.mark.parametrize("schema", [{"required": 5}, {"type": "object", "properties": None}])
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_keyword_of_a_wrong_type_does_not_end_the_worker(checker: ShapeChecker, kind: str, schema: Any) -> None:
    checker.source(StructuredOutputsParams(regex="a"))
    worker = checker._worker
    with pytest.raises(InvalidRequestError, match=r"wrong type|xpected|must be") as found:
        checker.source(StructuredOutputsParams(**{kind: schema}))
    assert kind in found.value.message and "ended" not in found.value.message
    assert worker is not None and worker is checker._worker and worker.poll() is None
