"""`quire compare` and the benchmarks with vLLM's flags. numpy and psutil are the judges."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from quire.cli import bench_startup, compare
from quire.cli.bench_offline import latency_result
from quire.cli.main import main
from tests.bench.test_peers import GOOD, comes, is_gone

PATIENCE_S = 60.0


def test_quire_beside_its_server(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "table.svg"
    words = ["compare", str(tiny), "--engines", "quire", "quire-server", "vllm", "sglang", "llama.cpp"]
    words += [
        "--workload",
        "W1",
        "W4",
        "--python",
        "sglang=/no/such/python",
        "--reps",
        "2",
        "--kv-cache-memory-bytes",
        "8MiB",
        "--json",
    ]
    assert main([*words, "--max-num-seqs", "4", "--svg", str(picture)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    states = {one["name"]: (one["state"], one["reason"]) for one in found["engines"]}
    assert states["quire"] == states["quire-server"] == ("ran", "")
    assert states["vllm"][0] == "unfit" and "its KV cache is of whole GiB, this is 8.0 MiB" in states["vllm"][1]
    assert states["sglang"] == ("missing", "/no/such/python cannot be run (No such file or directory)")
    assert states["llama.cpp"][0] == "unfit" and "--files llama.cpp=FILE.gguf" in states["llama.cpp"][1]
    assert "W4 is left out" in err and "sglang: not installed" in err and found["agreement_with"] == "quire"
    rates = {
        name: [run["output_tokens_per_second"] for run in found["runs"] if run["engine"] == name]
        for name in ("quire", "quire-server")
    }
    for one in found["figures"]:
        assert one["output_rate"]["median"] == pytest.approx(np.median(rates[one["engine"]]))
        assert one["runs"] == 2 and one["over_weights_bytes"] == one["peak_bytes"] - found["weight_bytes"]
    quire, server = (next(one for one in found["engines"] if one["name"] == name) for name in ("quire", "quire-server"))
    assert server["facts"]["is_client"] and not quire["facts"]["is_client"]
    assert server["facts"]["kv_bytes"] == 8 << 20 and server["facts"]["versions"]["quire-server"].startswith("quire ")
    assert quire["facts"]["kv_bytes"] == 8 << 20 and quire["facts"]["settings"]["max_num_seqs"] == 4
    assert {"weights", "outputs", "KV cache", "requests", "quire"} <= {one["point"] for one in found["fairness"]}
    assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_driver_of_ones_own(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also: an engine that only Quire reads is left out for the others, by name."""
    path = tmp_path / "mine.py"
    log, came = tmp_path / "log", "import json; open({!r}, 'a').write(json.dumps([items, {}]) + '\\n')"
    bound = "sorted(os.sched_getaffinity(0))" if hasattr(os, "sched_getaffinity") else "[]"
    path.write_text(GOOD.replace("TROUBLE", came.format(str(log), bound)).replace("BEGIN", "pass"))
    engine = tmp_path / "engine"
    assert main(["build", str(tiny), "-o", str(engine), "--quiet"]) == 0
    capsys.readouterr()
    words = ["compare", str(engine), "--engines", "transformers", "--driver", f"mine={path}", "--workload", "W1"]
    assert main([*words, "--reps", "1", "--quiet", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {one["name"]: one["reason"] for one in found["engines"]}
    assert states == {
        "transformers": "it does not read engine, an engine of quire build: name the checkpoint",
        "mine": "",
    }
    assert found["runs"][0]["elapsed_time"] == 0.5 and found["runs"][0]["peak_bytes"] > 2**20
    (warm_up, on), (first, _) = map(json.loads, log.read_text().splitlines())
    assert [(len(one["prompt_token_ids"]), one["num_output"]) for one in warm_up] == [(128, 128)]
    assert warm_up[0]["num_output"] == first[0]["num_output"]
    assert warm_up[0]["prompt_token_ids"][:16] != first[0]["prompt_token_ids"][:16], "no cache is warm"
    kept = {one["point"]: one["kept"] for one in found["fairness"]}
    if on:
        assert len(on) == 1, "one thread, one processor"
        assert f"1 threads each, what is started here on processors {on[0]};" in kept["device"]
    assert kept["KV cache"].startswith("2,048 MiB asked of each") and "KV cache 0 MiB" in kept["mine"]
    assert found["runs"][0]["ttfts_s"] == [0.1] and found["engines"][1]["facts"]["settings"] == {"threads": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_ctrl_c_leaves_no_process(tiny: Path) -> None:
    words = ["compare", str(tiny), "--engines", "quire", "quire-server", "--workload", "W1", "--reps", "1000"]
    command = [sys.executable, "-m", "quire", *words, "--kv-cache-memory-bytes", "8MiB"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "tok/s" not in (line := process.stderr.readline()):
        assert line, "it ended before its first turn"
    members = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
    assert len(members) >= 3
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert process.stderr.read().splitlines()[-1] == "quire: interrupted"
    assert all(is_gone(pid) for pid in members)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_process(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Not what a driver has forked either, which ignores all that can be ignored."""
    path, child = tmp_path / "mine.py", tmp_path / "child"
    fork = "[signal.signal(one, signal.SIG_IGN) for one in (1, 2, 15)]; child = os.fork()"
    new = f"{child}.new"
    write = f"child and (open({new!r}, 'w').write(str(child)), os.rename({new!r}, {str(child)!r}))"
    begin = f"import signal; {fork}; {write}; time.sleep(1000)"
    path.write_text(GOOD.replace("TROUBLE", "pass").replace("BEGIN", begin))
    words = ["compare", str(tiny), "--engines", "vllm", "--driver", f"mine={path}", "--workload", "W1"]
    command = [sys.executable, "-m", "quire", *words, "--kv-cache-memory-bytes", "8MiB", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert comes(lambda: child.exists() or process.poll() is not None)
    members = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
    assert int(child.read_text()) in members and len(members) >= 2
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 128 + number
    assert all(is_gone(pid) for pid in members)


def test_a_comparison_leaves_the_signals_as_they_were() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with compare._ended_by_signals():
        assert all(signal.getsignal(one) not in before for one in (signal.SIGTERM, signal.SIGHUP))
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reps", "0"], "reps must be between 1 and"),
        (["--num-prompts", "99"], "num_prompts must be between 1 and 32"),
        (["--batch-size", "0"], "batch_size must be between"),
        (["--run-timeout", "0"], "run_timeout must be above 0"),
        (["--python", "vllm"], "python must be NAME=VALUE with a NAME of quire, "),
        (["--python", "vlm=x"], "got 'vlm=x'"),
        (["--url", "vllm=http://127.0.0.1:1"], "vllm is taken"),
        (["--url", "x=http://127.0.0.1:1", "--driver", "x=x.py"], "x is taken"),
        (["--env", "vllm:A"], "env must be NAME=VALUE"),
        (["--env", "other:A=1"], "env must be NAME:VARIABLE=VALUE"),
        (["--kv-cache-memory-bytes", "much"], "kv_cache_memory_bytes"),
        (["--svg", "/no/such/folder/table.svg"], "there is no folder /no/such/folder"),
        (["/no/such/model"], "/no/such/model"),
        (["--url", "x=http://127.0.0.1:9", "--engines", "vllm", "--python", "vllm=/no"], "no engine ran: vllm: "),
    ],
)
def test_bad_words_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--quiet", *words]) != 0
    assert said in capsys.readouterr().err


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_bench_latency_has_vllms_figures(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    words = ["bench", "latency", "--model", str(tiny), "--input-len", "12", "--output-len", "5", "--batch-size", "3"]
    begun = time.perf_counter()
    assert main([*words, "--num-iters-warmup", "1", "--num-iters", "4", "--output-json", str(path), "--quiet"]) == 0
    found = read(path)
    assert found.keys() == {"avg_latency", "std_latency", "latencies", "percentiles"}
    assert len(found["latencies"]) == 4 and 0 < sum(found["latencies"]) < time.perf_counter() - begun
    assert "average latency" in capsys.readouterr().out
    assert (
        main([*words, "--n", "2", "--use-beam-search", "--num-iters-warmup", "0", "--num-iters", "1", "--quiet"]) == 0
    )
    assert main([*words, "--input-len", "100000"]) == 2
    assert "a request needs 100005 tokens" in capsys.readouterr().err


def test_latencies_are_counted_as_numpy_does() -> None:
    times = np.random.default_rng(1).random(23)
    found = latency_result(times.tolist())
    assert (found["avg_latency"], found["std_latency"]) == pytest.approx((times.mean(), times.std()))
    for percent in (10, 25, 50, 75, 90, 99):
        assert found["percentiles"][str(percent)] == pytest.approx(np.percentile(times, percent))


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        (["random", "--input-len", "20", "--output-len", "4"], 6 * 24),
        (["random", "--random-input-len", "20", "--output-len", "4", "--n", "2", "--prefix-len", "5"], 6 * 33),
        (["sharegpt-lengths", "--output-len", "2"], None),
    ],
)
def test_bench_throughput_of_a_dataset_has_vllms_figures(
    tiny: Path, tmp_path: Path, more: list[str], tokens: int | None
) -> None:
    path = tmp_path / "throughput.json"
    words = ["bench", "throughput", "--model", str(tiny), "--num-prompts", "6", "--quiet", "--output-json", str(path)]
    assert main([*words, "--dataset-name", *more]) == 0
    found = read(path)
    assert found.keys() == {
        "elapsed_time",
        "num_requests",
        "total_num_tokens",
        "requests_per_second",
        "tokens_per_second",
        "dataset_name",
    }
    assert found["dataset_name"] == more[0]
    assert found["num_requests"] == 6 and found["total_num_tokens"] == (tokens or found["total_num_tokens"]) > 6
    assert found["tokens_per_second"] == pytest.approx(found["total_num_tokens"] / found["elapsed_time"])


def test_bench_startup_has_vllms_figures(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "startup.json"
    words = ["bench", "startup", "--model", str(tiny), "--num-iters-cold", "1", "--num-iters-warmup", "0"]
    assert main([*words, "--num-iters-warm", "2", "--output-json", str(path), "--quiet"]) == 0
    found = read(path)
    for phase, count in (("cold", 1), ("warm", 2)):
        times = found[f"{phase}_startup_times"]
        assert len(times) == count and found[f"avg_{phase}_startup_time"] == pytest.approx(np.mean(times))
        assert found[f"{phase}_startup_percentiles"]["50"] == pytest.approx(np.median(times))
        firsts = found[f"{phase}_first_token_times"]
        assert all(whole > part > 0 for whole, part in zip(firsts, times, strict=True))
    assert "cold, LLM(...)" in capsys.readouterr().out


def test_a_start_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"the engine did not start: .*max_num_seqs"):
        bench_startup.start({"max_num_seqs": 0}, {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latency", "--batch-size", "0"], "batch_size must be between 1 and"),
        (["latency", "--output-json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["startup", "--num-iters-warm", "0"], "num_iters_warm must be between 1 and"),
        (["throughput", "--input-len", "5"], "go with --dataset-name"),
        (["throughput", "--dataset-name", "sharegpt-lengths", "--input-len", "5"], "go with --dataset-name random"),
        (["throughput", "--dataset-name", "sharegpt"], "the texts of sharegpt are not here; sharegpt-lengths: random"),
        (["throughput", "--dataset-name", "random", "--profile"], "go with --workload"),
        (["throughput", "--dataset-name", "random", "--num-prompts", "0"], "num_prompts must be between 1 and"),
        (["throughput", "--dataset-name", "random", "--random-range-ratio", "1"], "random_range_ratio"),
    ],
)
def test_bad_words_of_bench_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
