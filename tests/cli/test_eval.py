"""`quire eval` of tiny models: losses beside transformers', every kind of model, and one line for what cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers

from quire.bench.eval_report import how
from quire.cli.main import main
from quire.text.tokenizer import Tokenizer
from tests.cli.test_gguf import tokenizer_keys
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf

TEXT = "The lamp was lit at dusk; it said: 1, 2, 3 ships are late. " * 4
FLAGS = ("--threads", "1", "--quiet")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *words: object) -> list[Any]:
    """The tables."""
    assert main(["eval", *map(str, words), *FLAGS, "--json"]) == 0
    tables: list[Any] = json.loads(capsys.readouterr().out)["tables"]
    return tables


def test_formats_beside_transformers(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Perplexity of the reference to 1e-4 of that of transformers in float32, window by window; bfloat16 lost little,
    int4 more; float32 nothing at all."""
    words = ("none", "float32", "bfloat16", "int8", "int4:32", "int4,quantization_group_size=32")
    (table,) = evaluate(capsys, tiny, "--text", text, "--context", 64, "--stride", 40, "--quantization", *words)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    tokens, losses, done = Tokenizer.from_directory(tiny).encode(TEXT), [], 1
    for begin in range(0, len(tokens), 40):
        window = torch.tensor([tokens[begin : begin + 64]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(window).logits[0].double(), -1)
        end = begin + window.shape[1]
        losses += [-float(log_probs[at - begin - 1, tokens[at]]) for at in range(done, end)]
        done = end
        if end == len(tokens):
            break
    assert table["predicted_tokens"] == len(losses) == len(tokens) - 1
    assert table["reference"]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    rows = {row["format"]: row for row in table["rows"]}
    assert list(rows) == list(words)
    assert rows["float32"]["mean_kl"] == rows["float32"]["p99_kl"] == 0 and rows["float32"]["same_token"] == 1
    assert 0 < rows["bfloat16"]["mean_kl"] < rows["int8"]["mean_kl"] < rows["int4:32"]["mean_kl"]
    figures = [{k: v for k, v in rows[word].items() if k != "format"} for word in words[-2:]]
    assert figures[0] == figures[1]
    assert rows["float32"]["weight_bytes"] > 1.9 * rows["bfloat16"]["weight_bytes"]


def test_all_kinds_of_models_in_one_run(tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint, a GGUF file whose weights are on the grid of Q4_1, and an engine, all against the checkpoint."""
    file = write_gguf(tiny, tmp_path / "q4.gguf", "llama", plain("Q4_1"), **tokenizer_keys(tiny))
    engine = tmp_path / "engine"
    assert main(["build", str(tiny), "-o", str(engine), "--quiet", "--quantization", "int8"]) == 0
    capsys.readouterr()
    (table,) = evaluate(capsys, tiny, file, engine, "--text", text)
    assert table["notes"] == []
    own, gguf, built = table["rows"]
    assert [row["format"] for row in table["rows"]] == [f"{one.name} none" for one in (tiny, file, engine)]
    assert own["mean_kl"] < built["mean_kl"] < gguf["mean_kl"]
    (alone,) = evaluate(capsys, tiny, "--text", text, "--quantization", "int8")
    assert alone["rows"][0]["mean_kl"] == built["mean_kl"], "an engine has the bits of what it was built from"
    (apart,) = evaluate(capsys, engine, "--reference", tiny, "--text", text)
    assert {k: v for k, v in apart["rows"][0].items() if k not in ("format", "memory_ratio")} == {
        k: v for k, v in built.items() if k not in ("format", "memory_ratio")
    }
    of_file, beside = evaluate(capsys, file, "--text", text)
    assert "stored as Q4_1" in of_file["reference"]["name"] and "had been rounded before" in of_file["notes"][0]
    assert beside["title"] == "quire-demo" and "trained in bfloat16" in beside["notes"][-1]
    assert 0 < of_file["rows"][0]["mean_kl"] < gguf["mean_kl"]


def test_two_models_of_one_name_are_two_rows(tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / name / "model" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.symlink_to(tiny)
    (table,) = evaluate(capsys, *paths, paths[0], "--text", text, "--tokens", 101)
    assert [row["format"] for row in table["rows"]] == [f"{path} none" for path in paths]


def test_the_table(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command: text, and a drawing of the same figures."""
    svg = tmp_path / "table.svg"
    words = ["--table", "--reps", "2", "--quantization", "none", "int4", "--svg", str(svg)]
    assert main(["eval", str(tiny), "--text", str(text), *words, *FLAGS]) == 0
    shown = capsys.readouterr().out
    (none, int4) = (line for line in shown.splitlines() if line.startswith(("none", "int4")))
    assert none.count("1.00 x (1.00 to 1.00)") == 1 and " x (" in int4
    for word in (
        "processor: ",
        "quire: ",
        "threads: 1",
        "instruction_set: ",
        "load at the start: ",
        "runs: 2 of each workload",
        "W1 tok/s",
    ):
        assert word in shown
    assert "formats in turns" in shown
    drawn = {item.text for item in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"none", "int4", "speed, W1", "1.00 x", "100%"} <= drawn
    assert len(how([])) == 2


def test_a_text_with_bos_has_it_before_every_context(tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    """So the first token of each context is predicted too."""
    model = Path(shutil.copytree(tiny, tmp_path / "bos"))
    state = json.loads((model / "tokenizer.json").read_text())
    (special,) = [one for one in state["added_tokens"] if one["id"] == 256]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": special["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            special["content"]: {"id": special["content"], "ids": [256], "tokens": [special["content"]]}
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(state))
    (table,) = evaluate(capsys, model, "--text", text, "--context", 33)
    assert table["predicted_tokens"] == len(Tokenizer.from_directory(tiny).encode(TEXT))
    assert "contexts of 33, stride 32" in table["text"]
    assert main(["eval", str(model), str(tiny), "--text", str(text), *FLAGS]) == 2
    assert "the tokenizers of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quantization", "int3"], "quantization has no 'int3': none, bfloat16"),
        (["--quantization", "int4:33"], "quantization_group_size must be one of 32, 64, 128"),
        (["--quantization", "int8_w8a8:64"], "quantization_group_size is for"),
        (["--quantization", "int8,dtpe=float32"], "did you mean 'dtype'"),
        (["--quantization", "int8,core_process=true"], "'core_process'"),
        (["--quantization", "fp8:32"], "quantization_group_size is for"),
        (["--context", "513"], "context is 513; the model has 512 positions"),
        (["--context", "64", "--stride", "65"], "stride must be from 1 to 64"),
        (["--tokens", "99"], "too short: 98 tokens would be predicted, and 100 are the least"),
        (["--tokens", "0"], "is not a whole number from 1 to 1,048,576"),
        (["--text", "/nowhere/text"], "/nowhere/text cannot be read: no such file"),
        (["--svg", "/nowhere/table.svg"], "there is no folder /nowhere"),
        (["--reference", "/nowhere/model"], "/nowhere/model"),
        (["--reference", "quire-demo"], "cut this text differently"),
    ],
)
def test_one_line_for_what_cannot_be(tiny: Path, text: Path, words: list[str], said: str, capsys: Any) -> None:
    given = [] if "--text" in words else ["--text", str(text)]
    assert main(["eval", str(tiny), *given, *words, "--device", "cpu", *FLAGS]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1, err


def test_an_engine_is_no_reference(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    assert main(["build", str(tiny), "-o", str(engine), "--quiet", "--quantization", "int8"]) == 0
    assert main(["eval", str(engine), "--text", str(text), *FLAGS]) == 2
    err = capsys.readouterr().err
    assert "engine was built as int8, so it has no float32 reference: name its model with --reference" in err


def test_a_model_too_short_for_the_workload(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "short", tokenizer=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200}))
    assert main(["eval", str(model), "--table", "--text", str(text), *FLAGS]) == 2
    assert "workload W1 needs 256 positions; the model has 200" in capsys.readouterr().err
