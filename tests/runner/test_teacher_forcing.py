"""Teacher-forced logits: those of transformers, and from any place on the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.runner.teacher_forcing import STEP_TOKENS, TeacherForcing
from quire.weights.load import load_model
from tests.tiny.checkpoints import make_tiny

TEXT = [(7 * place * place + place) % 250 for place in range(STEP_TOKENS + 70)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def teacher(directory: Path) -> TeacherForcing:
    ops = CpuOps(2, instruction_sets()[-1])
    return TeacherForcing(load_model(directory, ops, dtype="float32"), ops, 16)


def test_the_logits_of_transformers(directory: Path, teacher: TeacherForcing) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0, :-1].numpy()
    found = np.concatenate(list(teacher.logits(TEXT)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [1, 63, STEP_TOKENS - 1, STEP_TOKENS, STEP_TOKENS + 69])
def test_from_a_place_on_the_same_bits(teacher: TeacherForcing, first: int) -> None:
    whole = np.concatenate(list(teacher.logits(TEXT)))
    chunks = list(teacher.logits(TEXT, first))
    assert max(map(len, chunks), default=0) <= 64
    found = np.concatenate([np.empty((0, whole.shape[1]), np.float32), *chunks])
    assert np.array_equal(found, whole[first:])


def test_texts_read_in_turns_do_not_meet(teacher: TeacherForcing) -> None:
    """As several models are read, chunk by chunk: each text has a cache of its own."""
    alone = np.concatenate(list(teacher.logits(TEXT)))
    pairs = list(zip(teacher.logits(TEXT), teacher.logits(TEXT[::-1]), strict=True))
    assert np.array_equal(np.concatenate([one for one, _ in pairs]), alone)
    assert not np.array_equal(np.concatenate([other for _, other in pairs]), alone)
