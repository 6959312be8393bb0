"""Teacher-forced logits of the runner: those of transformers, from any place on, with the bits of any other steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.runner.model_runner import FORCED_TOKENS, ModelRunner
from quire.weights.load import load_model
from tests.tiny.checkpoints import make_tiny

TEXT = [(7 * place * place + place) % 250 for place in range(FORCED_TOKENS + 70)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def runner(directory: Path) -> ModelRunner:
    ops = CpuOps(2, instruction_sets()[-1])
    model = load_model(directory, ops, dtype="float32")
    return ModelRunner(model, ops, num_blocks=21, block_size=16, max_rows=1, max_model_len=len(TEXT))


def test_the_logits_of_transformers(directory: Path, runner: ModelRunner) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0, :-1].numpy()
    found = np.concatenate(list(runner.forced_logits(TEXT)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [1, 63, FORCED_TOKENS - 1, FORCED_TOKENS, FORCED_TOKENS + 69])
def test_from_a_place_on_the_same_bits(runner: ModelRunner, first: int) -> None:
    whole = np.concatenate(list(runner.forced_logits(TEXT)))
    chunks = list(runner.forced_logits(TEXT, first))
    assert max(map(len, chunks), default=0) <= 64
    found = np.concatenate([np.empty((0, whole.shape[1]), np.float32), *chunks])
    assert np.array_equal(found, whole[first:])


def test_a_second_text_finds_nothing_of_the_first(runner: ModelRunner) -> None:
    other = TEXT[5:90]
    before = np.concatenate(list(runner.forced_logits(other)))
    list(runner.forced_logits(TEXT))
    assert np.array_equal(np.concatenate(list(runner.forced_logits(other))), before)
