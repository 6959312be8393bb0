"""Beam search, judged by transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire import LLM
from quire.engine.beam import BeamSearch
from quire.errors import InvalidRequestError
from quire.outputs import Logprob
from quire.sampling_params import BeamSearchParams
from tests.tiny.checkpoints import make_tiny

PROMPTS = [[10, 11, 12, 10, 11], [7, 200, 31, 90, 91, 92, 93, 94, 95]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("float32") / "llama", tokenizer=True)


@pytest.fixture(scope="module")
def judge(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def llm(directory: Path) -> Any:
    with LLM(str(directory), dtype="float32", max_num_seqs=16, max_model_len=256) as made:
        yield made


def judged(judge: Any, prompt: list[int], params: BeamSearchParams, eos: int | None) -> list[tuple[list[int], float]]:
    """Sequences and their scores, of transformers."""
    found = judge.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, eos_token_id=eos,
        num_beams=params.beam_width, num_return_sequences=params.beam_width, max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty, early_stopping=False, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    rows = []
    for ids, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = ids[len(prompt) :]
        if eos in tokens:
            tokens = tokens[: tokens.index(eos) + 1]
        rows.append((tokens, score))
    return rows


@pytest.mark.parametrize(("width", "length_penalty"), [(3, 1.0), (2, -0.5)])
def test_the_beams_are_those_of_transformers(llm: LLM, judge: Any, width: int, length_penalty: float) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=7, length_penalty=length_penalty)
    (eos,) = llm._served.limits.eos_token_ids
    for prompt, output in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
        expected = judged(judge, prompt, params, eos)
        assert [choice.token_ids for choice in output.outputs] == [tokens for tokens, _ in expected]
        for choice, (tokens, score) in zip(output.outputs, expected, strict=True):
            assert choice.cumulative_logprob is not None
            assert choice.cumulative_logprob / len(tokens) ** length_penalty == pytest.approx(score, abs=2e-4)
            assert choice.finish_reason == ("stop" if tokens[-1] == eos else "length")


def test_beams_end_where_those_of_transformers_do(llm: LLM, judge: Any) -> None:
    """With tokens of the best beam as the end, some sequences end early. Two may be equally good but for rounding, so
    that scores are compared, and of sequences the best."""
    params, num_early = BeamSearchParams(beam_width=4, max_tokens=7), 0
    for prompt in PROMPTS:
        (output,) = llm.beam_search([prompt], params)
        for eos in output.outputs[0].token_ids[1:3]:
            search = BeamSearch(params, 200, (eos,))
            while search.open:
                rows = [[*prompt, *beam.token_ids] for beam in search.open]
                outputs = llm.generate(rows, search.step, use_tqdm=False)
                search.advance([(one.outputs[0].logprobs or [{}])[0] for one in outputs])
            expected = judged(judge, prompt, params, eos)
            assert list(search.best[0].token_ids) == expected[0][0]
            scores = [search.score(beam) for beam in search.best]
            assert scores == pytest.approx([score for _, score in expected], abs=3e-4)
            num_early += sum(beam.finish_reason == "stop" and len(beam.token_ids) < 7 for beam in search.best)
    assert num_early > 0


def test_one_beam_is_greedy(llm: LLM, judge: Any) -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=10, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
        (choice,) = output.outputs
        expected = judge.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=10,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert choice.token_ids == expected[0, len(prompt) :].tolist()
        assert (
            choice.text
            == llm.get_tokenizer().decode([*prompt, *choice.token_ids])[len(llm.get_tokenizer().decode(prompt)) :]
            or "\ufffd" in choice.text
        )


def test_a_prompt_may_be_text_and_room_bounds_the_answer(llm: LLM) -> None:
    (output,) = llm.beam_search("x" * 250, BeamSearchParams(beam_width=3, max_tokens=50, ignore_eos=True))
    assert [len(choice.token_ids) for choice in output.outputs] == [6, 6, 6]
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    scores = [choice.cumulative_logprob or 0.0 for choice in output.outputs]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(InvalidRequestError, match="context length"):
        llm.beam_search("x" * 300, BeamSearchParams(beam_width=3, max_tokens=5))


def test_a_sequence_that_ends_is_kept_only_among_the_best() -> None:
    """Of two beams with token 9 as the end: it is third best of its step, so that it is no answer."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=5), 10, (9,))
    search.advance([{1: Logprob(-0.5, 1, ""), 2: Logprob(-1.0, 2, ""), 9: Logprob(-1.5, 3, "")}])
    assert [beam.token_ids for beam in search.open] == [(1,), (2,)] and search.best == []
    best = {9: Logprob(-0.1, 1, ""), 3: Logprob(-3.0, 2, ""), 4: Logprob(-4.0, 3, "")}
    search.advance([best, best])
    assert [beam.token_ids for beam in search.best] == [(1, 9), (2, 9)]
    assert search.open == [], "the best open beam, -3.5 by two tokens, is worse than the worst answer"


@pytest.mark.parametrize(
    ("values", "param"),
    [({"beam_width": 0}, "beam_width"), ({"beam_width": 20}, "beam_width"), ({"max_tokens": 0}, "max_tokens"),
     ({"temperature": 0.5}, "temperature"), ({"length_penalty": 11}, "length_penalty"),
     ({"ignore_eos": 1}, "ignore_eos"),
     ({"length_penalty": float("nan")}, "length_penalty")],
)  # fmt: skip
def test_a_value_out_of_range_is_named(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **values})
    assert raised.value.param == param
