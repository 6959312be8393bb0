"""What `quire plan` says: the course's Llama-2-7B, worked by hand, and the sizes that a run has."""

import json
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from quire import LLM
from quire.cli import machine_rates, plan_check
from quire.cli.main import main
from quire.config import what_would_fit
from quire.errors import ConfigurationError, QuireError
from quire.models.parameters import decoder_parameters
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.plan import probe
from quire.plan.estimate import ModelCost
from quire.plan.machine import FORMATS, MachineRates
from quire.weights.load import read_model_config
from quire.weights.pack import WeightPacker
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
MATRICES = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
"""Of every layer q, k, v, o and gate, up, down; and the head."""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_courses_example_and_what_it_gets_wrong(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 sequences of 2,048 tokens hold 16 GiB of cache. A token costs two operations a weight, so 13.2 GFLOP (not 45
    MFLOP), and 1.5 TB/s is the A100 of 40 GB: its step of one sequence is bound by reading 13.2 GB, 8.5 ms."""
    found = plan(capsys, llama, "--device", "a100-40", "--context", 2048, "--batch", 1, 16)
    assert found["parameters"] == f"{MATRICES + 32000 * 4096 + 65 * 4096:,}" == "6,738,415,616"
    assert found["cache"] == "524,288 bytes a token = 2 x 32 layers x 32 heads x 128 x 2 bytes"
    assert 524288 * 16 * 2048 == 16 * 2**30
    assert found["operations a token"].startswith(f"{2 * MATRICES / 1e9:,.2f} GFLOP") and 2 * MATRICES > 13.2e9
    one, sixteen = found["steps"]
    vectors = 65 * 4096 * 4
    assert one["floor_ms"] == pytest.approx((2 * MATRICES + vectors + 2**30) / 1555e9 * 1e3)
    assert sixteen["floor_ms"] == pytest.approx((2 * MATRICES + vectors + 16 * 2**30) / 1555e9 * 1e3)
    assert one["binds"] == sixteen["binds"] == "memory" and one["tpot_ms"] == pytest.approx(one["floor_ms"] / 0.8)
    assert found["sequences"].startswith(
        f"{int((0.9 * 40 * 2**30 - 2 * (MATRICES + 32000 * 4096) - vectors) // 2**30)} of 2,048"
    )
    operations = 2048 * (2 * (MATRICES - 32000 * 4096) + 4 * 4096 * 1024.5 * 32) + 2 * 32000 * 4096
    floor_ms = operations / 312e12 * 1e3
    text = f"{floor_ms:,.1f} ms at best, {floor_ms / 0.8:,.1f} ms at 80% of the floor's rate, for a prompt of 2,048"
    assert found["TTFT"].startswith(text) and "arithmetic" in found["TTFT"]


def test_where_it_turns(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With hardly any context a token takes 13.2 GFLOP, and a step 13.2 GB: from the ratio of the rates on."""
    found = plan(capsys, llama, "--device", "h100", "--context", 1, "--batch", 1)
    batch = int(found["turns"].split("from ")[1].split()[0])
    assert batch == pytest.approx(989e12 / 3350e9, rel=0.03)
    assert "any size" in plan(capsys, llama, "--device", "h100", "--context", 4096)["turns"]


def test_formats_take_what_their_bits_say(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def weights(*flags: object) -> float:
        return float(plan(capsys, llama, "--device", "h100", *flags)["weights"].split(" GB")[0])

    whole, tables = weights(), 2 * 32000 * 4096 / 1e9
    assert weights("--quantization", "int8") == pytest.approx(whole / 2, rel=0.002)
    assert weights("--quantization", "int4") == pytest.approx((whole - 2 * tables) / 2 * 4.5 / 8 + tables, rel=0.002)
    assert weights("--dtype", "float32") == pytest.approx(2 * whole, rel=0.002)
    assert "fp8 multiplies" in plan(capsys, llama, "--device", "h100", "--quantization", "fp8")["operations"]
    assert "bfloat16 multiplies" in plan(capsys, llama, "--device", "h100", "--quantization", "int4")["operations"]


def test_the_cache_in_other_types(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cache(dtype: str, *flags: object) -> str:
        return str(plan(capsys, llama, "--kv-cache-dtype", dtype, *flags)["cache"])

    assert cache("float32", "--device", "h100").startswith("1,048,576 bytes a token")
    words = "270,336 bytes a token = 2 x 32 layers x 32 heads x (128 x 1 + 4) bytes, a scale with each"
    assert cache("int8") == words and 270336 == 2 * 32 * 32 * 132
    assert main(["plan", str(llama), "--device", "h100", "--kv-cache-dtype", "int8"]) == 2
    assert "kv_cache_dtype of 8 bits runs on a CPU" in capsys.readouterr().err


def test_what_does_not_fit_and_what_would(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = plan(capsys, llama, "--device", "rtx-4090", "--context", 100_000)["sequences"]
    left = 24564 * 2**20 * 0.9 - 2 * (MATRICES + 32000 * 4096) - 65 * 4096 * 4
    assert f"--max-model-len {int(left // 524288)} would" in long
    heavy = plan(capsys, llama, "--device", "l4", "--dtype", "float32")["sequences"]
    assert "the weights alone exceed it by 5.2 GB; --quantization int8 would leave" in heavy


def test_sizes_are_those_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, quantization, cache in (
        ("gemma2", None, "fp8"),
        ("gpt2", "int8", "float16"),
        ("llama", "int4", "auto"),
    ):
        model = make_tiny(family, tmp_path / family)
        flags = [] if quantization is None else ["--quantization", quantization]
        flags += ["--device", "h100"] if cache != "fp8" else []
        found = plan(capsys, model, "--kv-cache-dtype", cache, *flags)
        with LLM(
            model=str(model), quantization=quantization, kv_cache_dtype=cache, max_num_seqs=1, max_model_len=64
        ) as llm:
            core = llm._engine.channel._core._executor._runner  # type: ignore[attr-defined]
            spoken = float(found["weights"].split(" GB")[0])
            assert spoken == pytest.approx(core._model.weight_bytes / 1e9, abs=6e-4)
            assert int(found["cache"].split(" ")[0].replace(",", "")) == core._model.cache_shape(1, 1).bytes_per_block


def test_sizes_of_files_and_engines_are_those_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever each matrix is held as: the header says it, and no weight is read."""
    model = make_tiny("llama", tmp_path / "model")
    file = write_gguf(model, tmp_path / "x.gguf", "llama", plain("Q8_0"))
    assert main(["build", str(model), "-o", str(tmp_path / "engine"), "--quantization", "int4", "--quiet"]) == 0
    for path in (file, tmp_path / "engine"):
        found = plan(capsys, path, "--device", "h100", "--context", 64)
        with LLM(model=str(path), max_num_seqs=1, max_model_len=64) as llm:
            core = llm._engine.channel._core._executor._runner  # type: ignore[attr-defined]
            assert float(found["weights"].split(" GB")[0]) == pytest.approx(core._model.weight_bytes / 1e9, abs=6e-4)
    assert "int8 twice" in found["operations"] or "bfloat16 multiplies" in found["operations"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"


POINTS = ((1, 1e9), (8, 4e9), (64, 8e9))
RATES = MachineRates(
    read=((2**20, 4e10), (2**28, 1e10)), units={"float32": 1e11}, linear=dict.fromkeys(FORMATS, POINTS),
    decode_key_s=1e-9, prompt_key_s=2e-9, call_s=1e-6, cold_s=1e-3, step_s=1e-4, row_s=1e-5, memory_bytes=2**34,
)  # fmt: skip


def test_a_step_is_its_parts(llama: Path) -> None:
    """By hand: every weight by the longer of reading and multiplying, keys, calls, and what Python takes."""
    config = read_model_config(llama)
    packer = WeightPacker(ReferenceOps(np), "float16", None, 0.0)
    cost = ModelCost(config.spec, decoder_parameters(config.spec, config.names), packer)
    keys = 100 * 32
    reading = 2 * MATRICES / 1e10
    assert reading < 2 * MATRICES / 1e9, "one row is bound by arithmetic at these rates"
    calls = 1e-6 * (7 * 32 + 3) + 1e-4 + 1e-5
    expected = 2 * MATRICES / 1e9 + max(1e-9 * 4096 * keys, 2 * 4096 * 2 * keys / 1e10) + calls
    assert RATES.decode_s(cost, 1, 100) == pytest.approx(expected)
    four = 8 * MATRICES / (1e9 + 3e9 * 3 / 7) + 4e-9 * 4096 * keys + calls + 3e-5
    assert RATES.decode_s(cost, 4, 100) == pytest.approx(four)
    head = 32000 * 4096
    prompt = 2 * 64 * (MATRICES - head) / 8e9 + 2 * head / 1e9 + 2e-9 * 4096 * 32 * 64 * 65 / 2 + calls
    assert RATES.prefill_s(cost, 64, 2048) == pytest.approx(prompt)
    assert RATES.prefill_s(cost, 64, 32) > prompt, "a head and calls for each chunk"


def test_the_memory_of_a_line_is_what_its_process_takes(home: Path, llama: Path, monkeypatch: Any, capsys: Any) -> None:
    """Weights, blocks of all sequences, a step, two copies of the logits, and a start; of this machine alone."""
    monkeypatch.setattr(machine_rates, "_measure", lambda ops: RATES)
    found = plan(capsys, llama, "--context", 100, "--batch", 1, 3, "--quantization", "int4_min")
    one, three = found["steps"]
    more = 2 * 7 * 16 * 524288 + 2 * 2 * 4 * 32000  # blocks of 16 tokens, and logits
    step = three["memory_mib"] - one["memory_mib"] - more / 2**20
    assert 0 < step < 200 * 4 * (32000 + 40 * 4096) / 2**20, "a step of 300 tokens in place of 100"
    weights = float(found["weights"].split()[0]) * 1e9
    assert one["memory_mib"] > (weights + 7 * 16 * 524288 + 6 * 2**20) / 2**20
    assert "memory_mib" not in plan(capsys, llama, "--device", "h100", "--context", 100, "--batch", 1)["steps"][0]


def test_keys_of_windows_are_counted(tmp_path: Path) -> None:
    config = read_model_config(make_tiny("gemma2", tmp_path))
    packer = WeightPacker(ReferenceOps(np), "float32", None, 0.0)
    cost = ModelCost(config.spec, decoder_parameters(config.spec, config.names), packer)
    windows = [layer.window or 10**9 for layer in config.spec.layers]
    assert min(windows) == 20
    for prompt in (1, 19, 20, 21, 77):
        counted = sum(min(place + 1, window) for place in range(prompt) for window in windows)
        assert cost.keys_seen_in_prompt(prompt) == counted
    assert cost.keys_seen(50) == sum(min(50, window) for window in windows)


def test_this_machine_is_measured_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(machine_rates, "_measure", lambda ops: seen.append(ops) or RATES)
    first = machine_rates.machine_rates()
    again = machine_rates.machine_rates()
    assert len(seen) == 1 and again == first and again.rates == RATES
    assert first.age(first.at_s + 10) == "measured now" and first.age(first.at_s + 600) == "measured 10 min ago"
    assert first.age(first.at_s + 86400) == "measured 24 h ago" and "3 days ago" in first.age(first.at_s + 3 * 86400)
    machine_rates.machine_rates(again=True)
    assert len(seen) == 2
    file = home / "quire" / machine_rates.FILE
    whole = json.loads(file.read_text())
    for damaged in (b"{", b"[]", json.dumps({**whole, "rates": {**whole["rates"], "linear": {}}}).encode(),
                    json.dumps({**whole, "rates": {**whole["rates"], "read": [[1, 0.0]]}}).encode(),
                    json.dumps({**whole, "machine": "another"}).encode()):  # fmt: skip
        file.write_bytes(damaged)
        assert machine_rates.machine_rates().rates == RATES
    assert len(seen) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert machine_rates.machine_rates().rates == RATES, "what cannot be kept is measured each time"


def test_the_probes_measure_something(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SIDE": 64,
        "LEAST_S": 1e-5,
        "TIMINGS": 1,
        "READ_BYTES": (2**22, 2**23),
        "READ_ALL": 2**23,
    }.items():
        monkeypatch.setattr(probe, name, value)
    ops, clock = CpuOps(1, "baseline"), time.perf_counter
    linear = probe.probe_linear(ops, clock)
    assert set(linear) == set(FORMATS) and all(rate > 0 for points in linear.values() for _, rate in points)
    assert [rows for rows, _ in linear["int4"]] == list(probe.ROWS)
    assert [size for size, _ in probe.probe_reads(ops.probe, clock)] == [2**22, 2**23]
    assert min(probe.probe_call(ops, clock), *probe.probe_attention(ops, "bfloat16", clock)) > 0
    assert probe.probe_cold(ops, 1e12, 0.0, clock) > 0 == probe.probe_cold(ops, 1.0, 0.0, clock)


def test_what_was_planned_is_checked(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_rates, "_measure", lambda _: RATES)
    model = make_tiny("llama", tmp_path / "model")
    flags = ["--context", 64, 128, "--batch", 1, 2, "--check", "--check-quantization", "none", "int8"]
    found = plan(capsys, model, *flags)
    assert found["device"].startswith("this machine: ") and "measured now" in found["device"]
    assert [(one["context"], one["batch"]) for one in found["steps"]] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    cells = [(one["quantization"], one["context"], one["batch"], one["what"]) for one in found["checked"]]
    assert len(cells) == len(set(cells)) == 12 and ("int8", 128, 1, "TTFT") in cells
    for one in found["checked"]:
        assert one["measured_ms"] > 0 and one["error"] == pytest.approx(one["predicted_ms"] / one["measured_ms"] - 1)
    errors = sorted(abs(one["error"]) for one in found["checked"])
    assert found["median_time_error"] == pytest.approx((errors[5] + errors[6]) / 2)
    assert [one["quantization"] for one in found["checked_memory"]] == ["none", "int8"]
    assert main(["plan", str(model), "--context", "64", "--batch", "1", "--check"]) == 0
    text = capsys.readouterr().out
    assert "floor, ms" in text and "predicted, ms" in text and "median error of time" in text


def test_a_start_that_will_not_fit_says_what_would(tmp_path: Path) -> None:
    """By the code of the plan."""
    model = make_tiny("llama", tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"fit \(num_gpu_blocks_override\); --max-model-len 64 would"):
        LLM(model=str(model), max_model_len=128, num_gpu_blocks_override=4)
    with pytest.raises(ConfigurationError, match="no quantisation makes it fit"):
        LLM(model=str(model), gpu_memory_utilization=1e-9)
    assert what_would_fit(1000, 10.0, 0).startswith("--max-model-len 100 would; --kv-cache-dtype int8")
    assert what_would_fit(-(10**9), 10.0, 4 * 10**9).endswith("by 1.0 GB; --quantization int8 would leave 1.0 GB")
    assert what_would_fit(-25 * 10**8, 10.0, 4 * 10**9).endswith("--quantization int4 would leave 0.4 GB")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--device", "abacus"], "device must be one of a100-40, "),
        (["--device", "h100", "--quantization", "int4_min"], "'int4_min' in groups, or with minima, runs on a CPU"),
        (["--device", "h100", "--check"], "check runs on this machine"),
        (["--batch", "0"], "'0' is not a whole number from 1"),
        (["--context", "4q"], "'4q' is not a whole number from 1"),
        (["--context", "99999999k"], "is not a whole number from 1 to 16,777,216"),
        (["--device", "h100", "--measure"], "measure runs on this machine"),
        (["--check-quantization", "int8"], "check_quantization goes with --check"),
        (["--quantization", "fp8", "--quantization-group-size", "32"], "quantization_group_size is for"),
    ],
)
def test_bad_flags(llama: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert main(["plan", str(llama), *flags]) == 2
    assert text in capsys.readouterr().err


def test_sizes_in_k(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, llama, "--device", "h100", "--context", "4k", "1M", "--batch", "1")
    assert [one["context"] for one in found["steps"]] == [4096, 2**20]
    assert "of 4,096 tokens fit" in found["sequences"] and "of 1,048,576 tokens" in found["sequences"]


def test_a_model_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none")]) != 0
    assert "there is no" in capsys.readouterr().err


def test_a_run_that_is_killed_or_ends_early_is_said(
    llama: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> "Killed":
            return self

        def result(self) -> None:
            raise BrokenProcessPool("abruptly")

    monkeypatch.setattr(machine_rates, "_measure", lambda ops: RATES)
    monkeypatch.setattr(plan_check, "ProcessPoolExecutor", Killed)
    assert main(["plan", str(llama), "--check", "--check-quantization", "int8"]) == 1
    assert "the process that ran int8 was killed" in capsys.readouterr().err

    class Ended:
        vocab_size = 100

        def generate(self, prompts: list[Any], *_: object, **__: object) -> list[Any]:
            one = SimpleNamespace(token_ids=[5], stop_reason="logits that are not finite", finish_reason="error")
            return [SimpleNamespace(outputs=[one])] * len(prompts)

    with pytest.raises(QuireError, match="of 64 tokens ended after 1 of 32: logits that are not finite"):
        plan_check._timed(cast(Any, Ended()), 2, 64)
