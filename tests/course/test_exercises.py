"""The exercises of the course: each check passes a right answer, sees a wrong one, and every ending is one line."""

import os
import py_compile
import re
import select
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.course import worker
from quire.course.checking import Failed, said, title
from quire.course.checks import sampler
from quire.course.exercises import EXERCISES, Exercise
from quire.course.process import CheckedFile
from scripts.house.tree import ROOT
from tests.conftest import PATIENCE_S

HERE = Path(__file__).parent
WRONG = tomllib.loads((HERE / "wrong.toml").read_text(encoding="utf-8"))["answer"]
OUR_ROUNDING = """
from quire.ops import quantize_reference as ours
from quire.ops.types import QuantizedWeight, QuantSpec


def quantize(weight, bits, group_size):
    found = ours.quantize(weight, QuantSpec("int8_groups" if bits == 8 else "int4", group_size))
    return found.values, found.scales


def dequantize(values, scales, group_size):
    return ours.dequantized(QuantizedWeight("int4", values, scales, group_size))
"""
OURS = "from quire.core.block_pool import BlockPool as BlockManager\n"


def checks_of(exercise: Exercise) -> dict[str, Any]:
    return {one.__name__: one for one in import_module(f"quire.course.checks.{exercise.name}").CHECKS}


def solution(exercise: Exercise) -> str:
    return (HERE / "solutions" / exercise.file_name).read_text(encoding="utf-8")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "learner", ModuleType("learner"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def loaded(text: str) -> ModuleType:
        path = tmp_path / "learner.py"
        path.write_text(text, encoding="utf-8")
        return worker.load(str(path))

    return loaded


@pytest.mark.parametrize("section", EXERCISES)
def test_a_right_answer_passes(section: str, capfd: pytest.CaptureFixture[str]) -> None:
    """As a learner runs it."""
    exercise = EXERCISES[section]
    answer = str(HERE / "solutions" / exercise.file_name)
    assert main(["course", "check", section, answer, "--timeout", str(PATIENCE_S)]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line[:1] != " "]
    titles = [title(check) for check in checks_of(exercise).values()]
    assert [line.partition(": ")[0] for line in lines] == [f"ok    {one}".partition(": ")[0] for one in titles]


@pytest.mark.parametrize("answer", WRONG, ids=lambda one: f"{one['exercise']}-{one['check']}")
def test_a_wrong_answer_is_seen(answer: dict[str, str], load: Any) -> None:
    exercise = EXERCISES[answer["exercise"]]
    text = solution(exercise)
    assert text.count(answer["old"]) == 1
    module = load(text.replace(answer["old"], answer["new"]))
    with pytest.raises(Failed) as failed:
        checks_of(exercise)[answer["check"]](module)
    assert answer["says"] in str(failed.value)


def test_every_check_has_a_wrong_answer() -> None:
    covered = {(one["exercise"], one["check"]) for one in WRONG}
    assert covered == {(section, name) for section, one in EXERCISES.items() for name in checks_of(one)}


def test_our_own_block_pool_passes(load: Any) -> None:
    module = load(OURS)
    assert all(check(module) for check in checks_of(EXERCISES["2.1"]).values())


def test_our_own_rounding_passes(load: Any) -> None:
    module = load(OUR_ROUNDING)
    told = {name: check(module) for name, check in checks_of(EXERCISES["3.3"]).items()}
    assert all(line.split()[-3] == line.split()[-2] for line in told["loss"].splitlines()[2:])


def test_the_course_s_block_manager_is_slow(load: Any) -> None:
    """`free_blocks.pop(0)`, as it is commonly taught."""
    text = solution(EXERCISES["2.1"]).replace("self.plain.pop()", "self.plain.pop(0)")
    with pytest.raises(Failed, match=r"of 32 blocks and [\d,]+ of 1,024; most of them in list\.pop\(0\)"):
        checks_of(EXERCISES["2.1"])["cheap"](load(text))
    again = load(text.replace("list(range(num_blocks))", "[*range(num_blocks)]"))
    py_compile.compile(str(again.__file__))
    with pytest.raises(Failed, match=r"most of them in list\.pop\(0\)"):  # whatever byte code lies beside the file
        checks_of(EXERCISES["2.1"])["cheap"](again)
    quick = "from collections import deque\n" + text.replace("self.plain = list(range", "self.plain = deque(range")
    checks_of(EXERCISES["2.1"])["cheap"](load(quick.replace("pop(0)", "popleft()")))


def test_what_a_sampler_should_give_is_what_transformers_gives() -> None:
    generation = transformers.generation.logits_process
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    row = torch.from_numpy(logits[None])
    for temperature, top_k, top_p, min_p in (
        (0.7, 0, 1.0, 0.1),
        (1.3, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (0.8, 9, 0.8, 0.02),
    ):
        judges = [generation.TemperatureLogitsWarper(temperature)]
        judges += [generation.MinPLogitsWarper(min_p)] if min_p else []
        judges += [generation.TopKLogitsWarper(top_k)] if top_k else []
        judges += [generation.TopPLogitsWarper(top_p)] if top_p < 1 else []
        scores = row
        for judge in judges:
            scores = judge(None, scores)
        wanted = torch.softmax(scores.double(), -1)[0].numpy()
        assert np.allclose(sampler._expected(logits, temperature, top_k, top_p, min_p), wanted, atol=1e-6)


TOLD_ON = "import os, sys\ntold = int(sys.argv[3])\n"
"""How a file finds the pipe."""
WROTE = "FAIL  the file is loaded: it wrote where the checks tell what they found"
NOT_SAID = (
    *(b"not json\n", b"\xff\n", b"[" * 5000 + b"\n", b"[1]\n", b"{}\n", b'{"checks": 1}\n', b'{"failed": null}\n'),
    *(b'{"passed": ""}\n', b'{"checks": [], "last": 1}\n', b"no end"),
)
ENDINGS = {
    "def take(:": "FAIL  the file is loaded: it raised SyntaxError: .* \\(line 1\\)",
    "while True:\n    pass": "FAIL  the file is loaded: it did not end within 0.7 s",
    f"{TOLD_ON}os.close(told)\nwhile True:\n    pass": "FAIL  the file is loaded: it did not end within 0.7 s",
    f"{TOLD_ON}os.close(told)": "FAIL  the file is loaded: it ended the process: exit code 1",
    **{f"{TOLD_ON}os.write(told, {line!r})": WROTE for line in NOT_SAID},
    f"{TOLD_ON}while True:\n    os.write(told, b'x' * 4096)": WROTE,
    "class E(Exception):\n    __str__ = 1\nraise E": "FAIL  the file is loaded: it raised E \\(line 3\\)",
    "raise SyntaxError(5)": "FAIL  the file is loaded: it raised SyntaxError: 5 \\(line 1\\)",
    "import os\nos.kill(os.getpid(), 40)": "FAIL  the file is loaded: it ended the process: signal 40",
    "x = 1": "FAIL  the file is loaded: it does not define bytes_per_token, blocks_for, sequences_that_fit",
    "import os\nos._exit(0)": "FAIL  the file is loaded: it ended the process: exit code 0",
    "import os\nos.abort()": "FAIL  the file is loaded: it ended the process: signal SIGABRT",
    "raise SystemExit(3)": "FAIL  the file is loaded: it raised SystemExit: 3 \\(line 1\\)",
    "x = bytearray(2**32)": "FAIL  the file is loaded: it raised MemoryError: more memory than a check may take.*",
    "while True:\n    print('x' * 1000)": "FAIL  the file is loaded: it raised OSError: .*File too large.*",
    "import beside": "FAIL  the file is loaded: it raised ModuleNotFoundError: No module named 'beside' .*",
    "def f(x):\n    return f(x)\nf(1)": "FAIL  the file is loaded: it raised RecursionError: .*",
}


@pytest.mark.parametrize("text", ENDINGS, ids=range(len(ENDINGS)))
def test_every_ending_is_one_line(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answer.py").write_text(text, encoding="utf-8")
    timeout = "0.7" if "True:\n    pass" in text else "10" if "print" in text else str(PATIENCE_S)
    assert main(["course", "check", "1.2", str(tmp_path / "answer.py"), "--timeout", timeout]) == 1
    first = capfd.readouterr().out.splitlines()[0]
    assert re.fullmatch(ENDINGS[text], first)


def test_a_loop_in_a_check_ends_it_and_what_follows_is_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = solution(EXERCISES["1.2"]).replace("return -(-num_tokens // block_size)", "\n    while True: pass")
    (tmp_path / "answer.py").write_text("print('begun')\n" + text, encoding="utf-8")
    assert main(["course", "check", "1.2", str(tmp_path / "answer.py"), "--timeout", "2"]) == 1
    assert [line[:4].strip() for line in capfd.readouterr().out.splitlines()] == ["ok", "ok", "FAIL", "-", "the", "be"]


def test_nothing_of_a_file_commands_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = r"print('\x1b[2J\x9b2Ja\tb\x07\x00', flush=True); raise ValueError('\x1b]0;title\x07 \x9b31m \ud800 é')"
    (tmp_path / "answer.py").write_text(text, encoding="utf-8")
    assert main(["course", "check", "1.2", str(tmp_path / "answer.py")]) == 1
    printed = "the file printed:\n  [2J2Ja\tb\n"
    assert capfd.readouterr() == (
        f"FAIL  the file is loaded: it raised ValueError: ]0;title 31m ? é (line 1)\n{printed}",
        "",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_loop_outlives_the_command(number: int, tmp_path: Path) -> None:
    """The file holds the pipe open, whose end comes when its process ends."""
    os.mkfifo(tmp_path / "alive")
    text = f"import os\nheld = os.open({str(tmp_path / 'alive')!r}, os.O_WRONLY)\nwhile True: pass"
    (tmp_path / "answer.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "quire", "course", "check", "1.2", str(tmp_path / "answer.py"), "--timeout", "100"]
    with subprocess.Popen(command) as process, (tmp_path / "alive").open("rb") as alive:
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == -number
        assert select.select([alive], [], [], PATIENCE_S)[0] and not alive.read()


def test_the_processor_is_taken_for_so_long_and_no_longer(tmp_path: Path) -> None:
    """Where the system does not end the process, and nobody waits for it."""
    found = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU), flush=True)\n"
    (tmp_path / "answer.py").write_text(found, encoding="utf-8")
    checked = CheckedFile(EXERCISES["1.2"], tmp_path / "answer.py", 9)
    assert [one.passed for one in checked.verdicts()] == [False]
    least = (1 + len(checks_of(EXERCISES["1.2"]))) * 9
    soft, hard = (int(number) for number in checked.printed[0].strip("()").split(", "))
    assert least < soft == hard < least + 120


def test_nothing_but_the_file_is_run(tmp_path: Path) -> None:
    """Modules beside the file and in the current folder have the names of what the checks import."""
    marker = tmp_path / "ran"
    for name in ("json", "numpy", "random", "quire", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').write({name!r})\n", encoding="utf-8")
    (tmp_path / "kv_cache.py").write_text(solution(EXERCISES["1.2"]), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "quire", "course", "check", "1.2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr, marker.exists()) == (0, "", False)
    assert not (tmp_path / "__pycache__").exists()


def test_start_writes_what_check_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["course", "check", "3.3"]) == 2
    assert "`quire course start 3.3` writes it" in capsys.readouterr().err
    assert main(["course", "start", "3.3"]) == 0
    (tmp_path / "quantiser.py").write_text("mine", encoding="utf-8")
    assert main(["course", "start", "3.3"]) == 1
    assert (tmp_path / "quantiser.py").read_text(encoding="utf-8") == "mine"
    for words in (
        ["start", "9.9"],
        ["check", "9.9"],
        ["start", "1.2", "nowhere"],
        ["check", "1.2", "x", "--timeout", "0"],
    ):
        assert main(["course", *words]) == 2
    assert "section 9.9 has no exercise; there are: 1.2, 2.1, 2.2, 3.2, 3.3" in capsys.readouterr().err


@pytest.mark.parametrize("section", EXERCISES)
def test_a_skeleton_says_what_is_missing(section: str, load: Any) -> None:
    module = load(EXERCISES[section].skeleton.read_text(encoding="utf-8"))
    for check in checks_of(EXERCISES[section]).values():
        with pytest.raises((Failed, NotImplementedError)) as failed:
            check(module)
        text = said(failed.value, str(module.__file__))
        assert re.search(r"it is not written yet \(line \d+\)", text), text


def test_a_recording_is_played_to_a_scheduler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recording, answer = tmp_path / "run.jsonl", str(HERE / "solutions/scheduler.py")
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    with LLM(max_num_seqs=4, max_model_len=64, record=str(recording)) as llm:
        llm.generate([f"What is {name}?" for name in "abcdefghi"], params, use_tqdm=False)
    assert main(["course", "check", "2.2", answer, "--recording", str(recording)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "ok    arrivals of the recording, beside static batches and Quire's own scheduler: 9 requests" in lines
    assert [line.split()[0] for line in lines[-3:]] == ["static", "yours", "Quire"]
    assert main(["course", "check", "2.2", answer, "--recording", answer]) == 2
    assert main(["course", "check", "3.2", str(HERE / "solutions/sampler.py"), "--recording", str(recording)]) == 2
    assert re.search(r"no recording.*line 1.*\n.*recording is for exercise 2\.2, not for 3\.2", capfd.readouterr().err)


def test_the_guide_shows_what_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = solution(EXERCISES["2.1"])
    for old, new in (("self.plain.pop()", "self.plain.pop(0)"), ("in reversed(block_ids)", "in block_ids")):
        text = text.replace(old, new)
    (tmp_path / "answer.py").write_text(text, encoding="utf-8")
    assert main(["course", "check", "2.1", str(tmp_path / "answer.py")]) == 1
    guide = (ROOT / "docs/guide/exercises.md").read_text(encoding="utf-8")
    shown = f"$ quire course check 2.1\n{capfd.readouterr().out}```"
    steps = re.compile(r"\d+,\d+")  # a line more or less, from one Python to the next
    assert steps.sub("#", shown) in steps.sub("#", guide)


def test_the_list_names_each_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["course", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXERCISES) == ["1.2", "2.1", "2.2", "3.2", "3.3"]
    assert all(Path(line.split()[-1]).is_file() for line in lines)
