"""What `quire plan` says: the course's Llama-2-7B, worked by hand, and the sizes that a run has."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire import LLM
from quire.cli.main import main
from tests.tiny.checkpoints import make_tiny

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
    assert found["sequences"].startswith(f"{int((36e9 - 2 * (MATRICES + 32000 * 4096) - vectors) // 2**30)} of 2,048")
    operations = 2048 * (2 * (MATRICES - 32000 * 4096) + 4 * 4096 * 1024 * 32) + 2 * 32000 * 4096
    assert found["TTFT"].startswith(f"{operations / 312e12 / 0.8 * 1e3:,.1f} ms") and "arithmetic" in found["TTFT"]


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
    left = 24e9 * 0.9 - 2 * (MATRICES + 32000 * 4096) - 65 * 4096 * 4
    assert f"--max-model-len {int(left // 524288)} would" in long
    heavy = plan(capsys, llama, "--device", "l4", "--dtype", "float32")["sequences"]
    assert "the weights alone exceed it by 5.4 GB; --quantization int8" in heavy


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


def test_this_machine_is_measured_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "model")
    found = plan(capsys, model, "--context", 128, "--batch", 1, 2, "--check")
    assert found["device"].startswith("this machine: ") and len(found["steps"]) == 2
    assert " ms a token, " in found["measured, batch 1"] and " tok/s" in found["measured, batch 2"]
    assert main(["plan", str(model), "--context", "128"]) == 0
    text = capsys.readouterr().out
    assert "floor, ms" in text and "cache " in text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--device", "abacus"], "device must be one of a100-40, "),
        (["--device", "h100", "--check"], "check runs on this machine"),
        (["--batch", "0"], "'0' is not a whole number from 1"),
        (["--quantization", "int8", "--quantization-group-size", "32"], "quantization_group_size is for"),
    ],
)
def test_bad_flags(llama: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert main(["plan", str(llama), *flags]) == 2
    assert text in capsys.readouterr().err


def test_a_model_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none")]) != 0
    assert "there is no" in capsys.readouterr().err
