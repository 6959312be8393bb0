"""Log-probabilities of a prompt against transformers, in chunks and in pieces, and nothing of them left behind."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quire.core.plan import NewRow, RowResult, ScheduledRow, StepPlan, TokenLogprobs
from quire.core.request import SamplingSpec
from quire.ops.reference import ReferenceOps
from quire.runner.memory import PROMPT_LOGPROB_ROWS
from quire.runner.model_runner import ModelRunner
from quire.sampling.sampler import NOT_FINITE
from quire.weights.load import load_model
from tests.tiny.checkpoints import make_tiny

ASKS = SamplingSpec(temperature=0.0, num_prompt_logprobs=3)
PLAIN = SamplingSpec(temperature=0.0)
PROMPT = [(7 * place * place + place) % 250 for place in range(150)]
BLOCKS = tuple(range(10))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def expected(directory: Path) -> Any:
    """`[len(PROMPT) - 1, vocabulary]`: row `i` is of the token at `i + 1`."""
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, :-1].double(), -1).numpy()


def runner(directory: Path) -> ModelRunner:
    ops = ReferenceOps(np)
    model = load_model(directory, ops, dtype="float32")
    return ModelRunner(model, ops, num_blocks=24, block_size=16, max_rows=2, max_model_len=192)


def enter(row: int, prompt: list[int], spec: SamplingSpec, blocks: tuple[int, ...]) -> NewRow:
    return NewRow(row, f"r{row}", tuple(prompt), len(prompt), spec, blocks)


def chunks(borders: list[int]) -> list[StepPlan]:
    """The prompt in row 0, cut at the borders."""
    plans = []
    for step, (start, end) in enumerate(pairwise(borders)):
        item = ScheduledRow(0, start, end - start, (), end == len(PROMPT))
        plans.append(StepPlan(step, (), (enter(0, PROMPT, ASKS, BLOCKS),) if step == 0 else (), (item,)))
    return plans


def compare(found: tuple[TokenLogprobs, ...], start: int, expected: Any) -> None:
    """`found` is of the tokens from `start + 1` on."""
    for place, item in enumerate(found, start):
        row, chosen = expected[place], PROMPT[place + 1]
        assert item.token_ids[0] == chosen
        assert item.logprobs == pytest.approx([row[token] for token in item.token_ids], abs=1e-4)
        assert item.ranks[0] == 1 + (row > row[chosen]).sum()
        assert [token for token in item.token_ids[1:]] == np.argsort(-row)[:3].tolist()


@pytest.mark.parametrize("borders", [[0, 150], [0, 70, 150], [0, 1, 2, 149, 150], [0, 149, 150]])
def test_a_prompt_has_the_logprobs_of_transformers(directory: Path, expected: Any, borders: list[int]) -> None:
    assert len(PROMPT) > 2 * PROMPT_LOGPROB_ROWS, "in several pieces"
    one = runner(directory)
    found = [one.execute(plan).rows[0].prompt_logprobs for plan in chunks(borders)]
    ends = [*borders[1:-1], len(PROMPT) - 1]
    assert [len(part) for part in found] == [end - start for start, end in zip(borders[:-1], ends, strict=True)]
    for start, part in zip(borders[:-1], found, strict=True):
        compare(part, start, expected)


def test_rows_of_one_step_are_kept_apart(directory: Path, expected: Any) -> None:
    """A row that did not ask stands before the one that did; neither gets those of the other."""
    one = runner(directory)
    one.execute(chunks([0, 70, 150])[0])
    other = enter(1, [5, 6, 7], PLAIN, (20,))
    both = ScheduledRow(1, 0, 3, (), True), ScheduledRow(0, 70, 80, (), True)
    plain, asked = one.execute(StepPlan(1, (), (other,), both)).rows
    compare(asked.prompt_logprobs, 70, expected)
    alone = runner(directory).execute(StepPlan(0, (), (other,), both[:1])).rows[0]
    assert plain == alone and plain.prompt_logprobs == ()


def test_the_next_request_of_the_row_gets_nothing(directory: Path) -> None:
    one = runner(directory)
    one.execute(chunks([0, 150])[0])
    plan = StepPlan(1, (0,), (enter(0, PROMPT, PLAIN, BLOCKS),), (ScheduledRow(0, 0, 150, (), True),))
    assert one.execute(plan).rows[0].prompt_logprobs == ()


def test_logits_that_are_not_finite_fail_their_prompt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position of the second piece, which no token is sampled from."""
    one = runner(directory)
    plain = one._model.logits

    def broken(hidden: Any) -> Any:
        logits = plain(hidden)
        if len(hidden) == PROMPT_LOGPROB_ROWS:
            logits[17] = np.nan
        return logits

    monkeypatch.setattr(one._model, "logits", broken)
    other = enter(1, [5, 6, 7], PLAIN, (20,))
    rows = ScheduledRow(1, 0, 3, (), True), ScheduledRow(0, 0, 150, (), True)
    fine, failed = one.execute(StepPlan(0, (), (enter(0, PROMPT, ASKS, BLOCKS), other), rows)).rows
    assert failed == RowResult(0, (), error=NOT_FINITE)
    assert fine.error is None and len(fine.token_ids) == 1
