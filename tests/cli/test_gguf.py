"""A GGUF file wherever a model is named: the answers are those of the checkpoint that it was made of."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import ConfigurationError, ModelFileError
from quire.ops.reference import ReferenceOps
from quire.text.gguf_tokenizer import gguf_tokenizer
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.gguf_file import GgufFile
from quire.weights.formats.gguf_text import read_gguf_tokenizer_values
from quire.weights.generation_config import load_generation_defaults
from quire.weights.load import open_source, plan_weights, read_model_config
from tests.text.gguf_headers import NORMAL, header_of
from tests.tiny.checkpoints import END_OF_TEXT, make_tiny
from tests.tiny.gguf_files import plain, write_gguf
from tests.weights.test_gguf_file import mutated

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 96, "num_gpu_blocks_override": 32, "threads": 1}
CHAT = [{"role": "user", "content": "What is TTFT?"}]


def tokenizer_keys(directory: Path) -> dict[str, Any]:
    state = json.loads((directory / "tokenizer.json").read_text())
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    keys = header_of(state, "gpt-2", eos_token_id=END_OF_TEXT, bos_token_id=END_OF_TEXT, add_bos_token=False)
    # No array of a header is empty: two spaces, of which no text here has any, are a token.
    keys["tokenizer.ggml.tokens"].append("ĠĠ")
    keys["tokenizer.ggml.token_type"].append(NORMAL)
    keys |= {
        "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.chat_template": template,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 7,
    }
    return keys | {"general.sampling.penalty_repeat": 1.25}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, and what may be named in its place."""
    root = tmp_path_factory.mktemp("gguf")
    directory = make_tiny("llama", root / "checkpoint", tokenizer=True)
    (root / "one").mkdir()
    file = write_gguf(directory, root / "one" / "tiny.gguf", "llama", **tokenizer_keys(directory))
    (root / "sha256-0a1b").symlink_to(file)
    return {"checkpoint": directory, "file": file, "directory": file.parent, "blob": root / "sha256-0a1b"}


def answers(path: Path, **more: Any) -> list[list[int]]:
    with LLM(str(path), **(SIZES | more)) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.chat([CHAT], params, use_tqdm=False) + llm.generate(["分頁 is"], params, use_tqdm=False)
        return [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path]) -> Iterator[list[list[int]]]:
    yield answers(paths["checkpoint"])


@pytest.mark.parametrize("named", ["file", "directory", "blob"])
@pytest.mark.parametrize("core_process", [False, True])
def test_answers_are_those_of_the_checkpoint(
    named: str, core_process: bool, paths: dict[str, Path], expected: list[list[int]]
) -> None:
    assert answers(paths[named], core_process=core_process) == expected


def test_the_header_gives_the_defaults_and_the_ends(paths: dict[str, Path]) -> None:
    with LLM(str(paths["file"]), **SIZES) as llm:
        params = llm.get_default_sampling_params()
        assert params.temperature == 0.5 and params.top_k == 7 and params.repetition_penalty == 1.25


def test_int8_of_a_file_in_blocks_is_int8_of_its_values(paths: dict[str, Path], tmp_path: Path) -> None:
    """What was unpacked is packed as any checkpoint is."""
    import gguf
    from gguf.quants import dequantize, quantize
    from safetensors.numpy import load_file, save_file

    keys = tokenizer_keys(paths["checkpoint"])
    file = write_gguf(paths["checkpoint"], tmp_path / "blocks.gguf", "llama", plain("Q8_0"), **keys)
    values = tmp_path / "values"
    values.mkdir()
    for item in paths["checkpoint"].iterdir():
        if item.suffix != ".safetensors":
            (values / item.name).symlink_to(item)
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = load_file(paths["checkpoint"] / "model.safetensors")
    save_file(
        {n: t if t.ndim == 1 else dequantize(quantize(t, kind), kind) for n, t in tensors.items()},
        values / "model.safetensors",
    )
    for quantization in (None, "int8"):
        ours, theirs = (answers(p, quantization=quantization, dtype="bfloat16") for p in (file, values))
        assert ours == theirs


def test_the_verbs_take_a_file(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-model-len", "96", "--max-tokens", "5", "--temperature", "0", "--repetition-penalty", "1"]
    texts = []
    for model in (paths["checkpoint"], paths["file"], paths["blob"]):
        assert main(["generate", str(model), "hello", *flags]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert "dtype" in captured.err
    assert texts[0] == texts[1] == texts[2]
    assert main(["generate", "--model", str(paths["file"]), "--quiet", "hello", *flags]) == 0
    assert capsys.readouterr().out == texts[0]


def test_a_damaged_file_is_an_error_of_one_line(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(paths["file"].read_bytes())
    os.truncate(tmp_path / "x.gguf", paths["file"].stat().st_size // 2)
    assert main(["generate", str(tmp_path / "x.gguf"), "hello"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "x.gguf: truncated" in captured.err
    with pytest.raises(ModelFileError, match=r"x\.gguf: truncated"):
        LLM(str(tmp_path / "x.gguf"), core_process=True)


def test_a_file_can_be_inspected_and_planned(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(paths["checkpoint"], tmp_path / "q.gguf", "llama", plain("Q8_0"))
    assert main(["inspect", "--json", str(file)]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)["parameters"]}
    assert lines["0.qkv"]["format"] == "Q8_0" and lines["0.qkv"]["tensors"][0] == "blk.0.attn_q.weight"
    assert lines["0.qkv"]["num_bytes"] == 128 * 64 // 32 * 34
    assert main(["plan", str(file), "--device", "h100"]) == 0


def test_mutated_files_are_models_or_refused_and_nothing_else(paths: dict[str, Path], tmp_path: Path) -> None:
    """Past the header too: hyper-parameters, places of tensors, tokenizer, ends and defaults."""
    data, path = paths["file"].read_bytes(), tmp_path / "x.gguf"
    with GgufFile(paths["file"]) as whole:
        header_bytes = min(found.start for found in whole.tensors.values())
    rng, outcomes = random.Random(1), set()
    for number in range(300):
        changed = bytearray(data if number % 4 else mutated(data, header_bytes, rng))
        for _ in range(rng.randint(1, 2) if number % 4 else 0):
            changed[rng.randrange(24, header_bytes)] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            config = read_model_config(path)
            with open_source(path, config) as source:
                plan_weights(config, source, ReferenceOps(np))
            load_generation_defaults(path)
            header = read_gguf_tokenizer_values(path)
            if header.values:
                Tokenizer(gguf_tokenizer(header.name, header.values, header.architecture)).encode("hello <|user|> 12")
            outcomes.add("read")
        except ConfigurationError as error:
            assert error.message.count("\n") == 0 and len(error.message) < 800
            outcomes.add(type(error).__name__)
    assert outcomes == {"read", "ModelFileError", "UnsupportedModelError"}
