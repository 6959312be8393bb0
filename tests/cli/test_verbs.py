"""The verbs as a user runs them: in a process of their own, over the real engine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from quire import LLM, SamplingParams
from quire.bench.workloads import WORKLOADS, longest
from quire.cli import banner
from quire.cli.main import main
from quire.outputs import Decision
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
HEAVY = {"starlette", "uvicorn", "pydantic", "huggingface_hub", "prometheus_client", "torch", "transformers"}


def quire(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire", *map(str, words)],
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
        check=False,
    )


def test_generate_streams_and_shows_a_banner(tiny: Path) -> None:
    done = quire("generate", "--model", tiny, "--max-tokens", 6, "--temperature", 0, "--ignore-eos", "hello")
    assert done.returncode == 0, done.stderr
    with LLM(model=str(tiny)) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        (output,) = llm.chat([{"role": "user", "content": "hello"}], params, use_tqdm=False)
    assert done.stdout == f"{output.outputs[0].text}\n"
    assert re.match(rf"quire \S+  {tiny.name}\n", done.stderr)
    assert "num_blocks" in done.stderr
    quiet = quire(
        "generate", "--quiet", "--model", tiny, "--max-tokens", 6, "--temperature", 0, "--ignore-eos", text="hello\n"
    )
    assert quiet.stderr == ""
    assert quiet.stdout == done.stdout


def test_generate_json(tiny: Path) -> None:
    done = quire(
        *("generate", "--quiet", "--model", tiny, "--max-tokens", 4, "--ignore-eos"),
        *("--json", "--n", 2, "--seed", 3, "--temperature", 1, "one", "--raw"),
    )
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert (answer["prompt"], answer["prompt_tokens"]) == ("one", 3)
    assert [(item["tokens"], item["finish_reason"]) for item in answer["outputs"]] == [(4, "length")] * 2
    many = quire("generate", "--quiet", "--model", tiny, "--max-tokens", 2, "--json", "a", "b", "c")
    assert [json.loads(line)["prompt"] for line in many.stdout.splitlines()] == ["a", "b", "c"]


def test_one_form_for_all_verbs(tiny: Path) -> None:
    """Two words are a model and a prompt, as `serve DIR` and `chat DIR` take the model."""
    flags = ("generate", "--quiet", "--max-tokens", 6, "--temperature", 0, "--ignore-eos")
    named = quire(*flags, "--model", tiny, "hello")
    assert named.returncode == 0 and named.stdout.strip()
    assert quire(*flags, tiny, "hello").stdout == named.stdout
    assert quire(*flags, tiny, text="hello\n").stdout == named.stdout
    many = quire(*flags, tiny, "--json", "hello", "you")
    assert [json.loads(line)["prompt"] for line in many.stdout.splitlines()] == ["hello", "you"]
    embedded = [quire(*flags, *words).stdout for words in (["hello"], ["quire-demo", "hello"])]
    assert embedded[0] == embedded[1] != named.stdout
    assert quire(*flags, "quire-demo", text="hello\n").stdout == embedded[0]


def test_the_banner_says_which_sampling_applies(tiny: Path) -> None:
    done = quire("generate", "--max-tokens", 2, tiny, "hello")
    lines = [line.split(maxsplit=1)[1] for line in done.stderr.splitlines() if line.strip().startswith("sampling ")]
    assert lines[0] == "max_tokens 2  (flags)" and lines[1].startswith("temperature 1.0  (default")
    assert lines[2].startswith("min_p 0.05  (default: the model states no")


def test_generate_imports_nothing_of_the_server(tiny: Path) -> None:
    program = (
        "import sys\nfrom quire.cli.main import main\n"
        f"code = main(['generate', '--quiet', '--model', {str(tiny)!r}, '--max-tokens', '2', 'x'])\n"
        f"print(code, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, env=ENVIRONMENT, check=True
    )
    assert done.stderr == "0 []\n"


def test_what_few_models_need_is_imported_for_them_alone(tiny: Path) -> None:
    """The readers of GGUF, of quantised checkpoints and of YAML; numpy is the core's, not of the text's side, and all
    of numpy (f2py, its tests) is for none."""
    program = (
        "import sys\nimport quire.llm\nprint('numpy' in sys.modules)\nfrom quire.cli.main import main\n"
        f"main(['generate', '--quiet', '--model', {str(tiny)!r}, '--max-tokens', '2', 'x'])\n"
        "print([name for name in sys.modules if name.startswith('quire.') and ('gguf_file' in name or 'yaml' in name"
        " or 'structural_tag' in name or 'quantized.' in name) or name in ('numpy.f2py', 'numpy.testing')],"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, env=ENVIRONMENT, check=True
    )
    assert done.stderr == "[]\n" and done.stdout.startswith("False\n")


def test_chat_reads_a_pipe(tiny: Path) -> None:
    lines = "hi\n\n/help\n/nope\n/reset\nyou\n/exit\nnever said\n"
    done = quire("chat", tiny, "--quiet", "--max-tokens", 4, "--system-prompt", "be short", text=lines)
    assert done.returncode == 0, done.stderr
    assert "/clear " in done.stderr and "forget what was said" in done.stderr
    assert "/nope is not known" in done.stderr
    assert ">" not in done.stdout.split("\n")[0][:2]


def test_chat_goes_on_after_a_refusal(tiny: Path) -> None:
    done = quire("chat", tiny, "--quiet", "--max-tokens", 2, text="x" * 600 + "\nhi\n")
    assert done.returncode == 0
    assert done.stderr.count("quire: ") == 1
    assert "/clear begins anew" in done.stderr
    assert done.stdout


def test_errors_of_files_are_one_line_and_code_1(tmp_path: Path) -> None:
    done = quire("generate", "--quiet", "--model", tmp_path, "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"quire: [^\n]+\n", done.stderr)
    assert "Traceback" not in done.stderr


def test_serve_answers_and_stops_with_code_0(tiny: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "quire",
        "serve",
        str(tiny),
        "--port",
        "0",
        "--api-key",
        "k",
        "--max-num-seqs",
        "4",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            lines = []
            while not lines or not lines[-1].startswith("ready on "):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            url = lines[-1].split()[-1]
            assert process.stderr.readline() == f"live view: {url.removesuffix('/v1')}/ui\n"
            assert httpx.get(f"{url}/models", timeout=PATIENCE_S).status_code == 401
            headers = {"authorization": "Bearer k"}
            assert httpx.get(f"{url}/models", headers=headers, timeout=PATIENCE_S).json()["data"][0]["id"] == tiny.name
            body = {"model": str(tiny), "prompt": "x", "max_tokens": 3, "ignore_eos": True}
            answer = httpx.post(f"{url}/completions", json=body, headers=headers, timeout=PATIENCE_S)
            assert answer.json()["usage"]["completion_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_busy_port_is_found_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags in (("--port",), ("--port", 0, "--ui-port")):
            done = quire("serve", "/nonexistent/model", *flags, port)
            assert done.returncode == 2
            advice = f"({flags[-1]} N, or {flags[-1]} 0 for a free one)"
            assert f"cannot listen on 127.0.0.1:{port}: address already in use {advice}" in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_bench_throughput_with_json(tiny: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = quire(
        *("bench", "throughput", "--model", tiny, "--workload", "W1", "W4", "--reps", 2),
        *("--output-json", result, "--max-num-seqs", 4),
    )
    assert done.returncode == 0, done.stderr
    assert "W4 is left out" in done.stderr
    assert re.search(r"^W1 +quire +2 ", done.stdout, re.MULTILINE)
    report = json.loads(result.read_text())
    assert {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"} <= set(
        report["runs"][0]
    )
    assert [run["total_num_tokens"] for run in report["runs"]] == [256, 256]
    assert report["machine"]["model"] == tiny.name


def test_bench_profile_accounts_for_the_whole_time(tiny: Path) -> None:
    done = quire("bench", "throughput", "--model", tiny, "--workload", "W1", "--reps", 2, "--profile", "--quiet")
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\w.*?) {2,}(?:([<>]=?\d+) +(\d+))? +(\d+\.\d{3}) +(\d+\.\d)%", done.stdout, re.MULTILINE)
    found = {(operation, rows): int(calls or 0) for operation, rows, calls, _, _ in lines}
    layers = json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    # The last layer of a prompt attends for its last token alone.
    assert found["attention", "<=1"] == 2 * (127 * layers + 1)
    assert found["attention", "<=128"] == 2 * (layers - 1)
    assert found["embed", "<=1"] == 2 * 127
    assert sum(calls for (operation, _), calls in found.items() if operation.startswith("greedy")) == 2 * 128
    assert sum(float(share) for *_, share in lines) == pytest.approx(100, abs=0.1 * len(lines))


def test_bench_profile_is_refused_where_another_process_computes(tiny: Path) -> None:
    done = quire("bench", "throughput", "--model", tiny, "--profile", "--core-process")
    assert done.returncode == 2
    assert "a profile is of this process" in done.stderr


def test_bench_core_prints_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "core", "--rows", "4", "16", "--steps", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    alone, whole = lines[:4], lines[4:]
    assert "alone" in alone[0] and "core us/step" in alone[1]
    assert "runner" in whole[0] and "all us/step" in whole[1]
    for rows in (alone[2:], whole[2:]):
        assert [int(row.split()[0]) for row in rows] == [4, 16]
        assert all(word == "-" or float(word) > 0 for row in rows for word in row.split())
    parts = [[float(word) for word in row.split()] for row in whole[2:]]
    assert all(abs(sum(part[1:4]) - part[4]) < 0.3 for part in parts)


def test_bench_structured_counts_as_jsonschema_does(tmp_path: Path) -> None:
    """One schema that is held, one that is refused, and instances that are labelled falsely."""
    held = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    instances: list[tuple[Any, bool]] = [({"a": 12}, True), ({"a": "x"}, True), ({"a": 1}, False), ({}, False)]
    judge = jsonschema_rs.Draft202012Validator(held)
    (tmp_path / "held.json").write_text(
        json.dumps({"schema": held, "tests": [{"data": data, "valid": valid} for data, valid in instances]})
    )
    refused = {"not": {"type": "string"}}
    (tmp_path / "refused.json").write_text(json.dumps({"schema": refused, "tests": [{"data": 1, "valid": True}]}))
    figures = tmp_path / "out" / "figures.json"
    figures.parent.mkdir()
    done = quire(
        *("bench", "structured", "--schemas", tmp_path, "--rows", 2, "--reps", 2, "--quiet", "--output-json", figures)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    (masks,) = found["masks"]
    assert masks["schemas"] == 2 and masks["counts"]["refused"] == 1
    assert masks["counts"]["wrong_accepts"] == sum(judge.is_valid(data) and not valid for data, valid in instances)
    assert masks["counts"]["wrong_rejects"] == sum(valid and not judge.is_valid(data) for data, valid in instances)
    assert masks["counts"]["right_accepts"] == sum(judge.is_valid(data) and valid for data, valid in instances)
    assert masks["counts"]["right_rejects"] == sum(not judge.is_valid(data) and not valid for data, valid in instances)
    assert masks["us"]["compile"]["n"] == 1 and 0 < masks["us"]["mask"]["p50"] <= masks["us"]["mask"]["max"]
    assert [one["mode"] for one in found["speed"]] == ["free", "letters", "keys", "keys, one by one"]
    assert all(one["rows"] == 2 and len(one["ms"]) == 2 for one in found["speed"])
    steps = {one["mode"]: one["steps"] for one in found["speed"]}
    assert steps["keys"] < 0.5 and steps["keys, one by one"] >= 1.0
    assert "llguidance: " in done.stdout and "load of this machine: " in done.stdout


@pytest.mark.parametrize("text", ["", "[]", '{"schema": {}}', "{"])
def test_bench_structured_refuses_a_folder_without_cases(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "one.json").write_text(text)
    done = quire("bench", "structured", "--schemas", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("quire: --schemas: ")
    assert len(done.stderr.splitlines()) == 1


def test_workloads_have_their_shapes_and_repeat() -> None:
    shapes = {name: (len(make(0, 50_000)), longest(make(0, 50_000))) for name, make in WORKLOADS.items()}
    assert shapes["W1"] == (1, 256)
    assert shapes["W2"][0] == 32
    assert shapes["W3"] == (16, 1088)
    assert shapes["W4"] == (1, 4097)
    for make in WORKLOADS.values():
        first, again, other = make(0, 50_000), make(0, 50_000), make(1, 50_000)
        assert first == again
        assert [len(item.prompt_token_ids) for item in first] == [len(item.prompt_token_ids) for item in other]
        assert first[0].prompt_token_ids != other[0].prompt_token_ids
        assert all(0 <= token < 320 for item in make(0, 320) for token in item.prompt_token_ids)
    assert len({tuple(item.prompt_token_ids[:1024]) for item in WORKLOADS["W3"](0, 50_000)}) == 1


def test_banner_gives_reasons() -> None:
    decisions = [Decision("threads", "2", "the cores"), Decision("isa", "avx2", "")]
    assert banner.lines(decisions) == ["threads  2  (the cores)", "isa      avx2"]


def test_a_panic_of_the_tokenizer_is_one_line_and_an_end(tiny: Path, tmp_path: Path) -> None:
    """The library's own report of it, which it writes to standard error itself, is not ours."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "FixedLength", "length": 0}  # it divides by that
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    done = quire("generate", "--quiet", "--raw", "--model", tmp_path, "--max-tokens", 2, "hello")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith("quire: the tokenizer fails on this text\n") and "Traceback" not in done.stderr
