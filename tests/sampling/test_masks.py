"""End to end: `min_tokens` to the token, and bad words as transformers has them, on a tiny model."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from quire import LLM, CompletionOutput, SamplingParams
from tests.tiny.checkpoints import END_OF_TEXT, make_tiny

HI, SPACE_HI, DAY, SPACE_DAY, BYE = 300, 301, 302, 303, 304
MERGED = {HI: "hi", SPACE_HI: " hi", DAY: "day", SPACE_DAY: " day", BYE: "bye"}


def add_words(directory: Path) -> None:
    """Beside the tokenizer's bytes: whole words, each on its own and after a space, as byte-level models have them."""
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = {"da": 298, "by": 299}
    vocabulary |= {word.replace(" ", "Ġ"): token_id for token_id, word in MERGED.items()}
    state["model"]["vocab"] |= vocabulary
    state["model"]["merges"] = [pair.split("+") for pair in "h+i Ġ+hi d+a da+y Ġ+day b+y by+e".split()]
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny("llama", tmp_path_factory.mktemp("float32") / "llama", tokenizer=True)
    add_words(directory)
    return directory


@pytest.fixture(scope="module")
def judge(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlapped"])
def llm(model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(model=str(model), dtype="float32", async_scheduling=request.param) as llm:
        yield llm


def ask(llm: LLM, prompt: Sequence[int], **params: Any) -> CompletionOutput:
    params = {"max_tokens": 12, "temperature": 0.0, **params}
    return llm.generate([list(prompt)], SamplingParams(**params), use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize("prompt", [[10], [10, 11, 12], [13] * 17])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_the_end_may_come_right_after_the_minimum(llm: LLM, prompt: list[int], min_tokens: int) -> None:
    """With an end of sequence that is always the best, it is the first token after `min_tokens` others, as in vLLM."""
    wants_end = {END_OF_TEXT: 100.0}
    found = ask(llm, prompt, min_tokens=min_tokens, logit_bias=wants_end)
    assert (len(found.token_ids), found.finish_reason, found.stop_reason) == (min_tokens + 1, "stop", None)
    assert found.token_ids[-1] == END_OF_TEXT and END_OF_TEXT not in found.token_ids[:-1]
    found = ask(llm, prompt, min_tokens=min_tokens, logit_bias={50: 100.0}, stop_token_ids=[50], ignore_eos=True)
    assert (len(found.token_ids), found.finish_reason, found.stop_reason) == (min_tokens + 1, "stop", 50)
    assert 50 not in found.token_ids[:-1]


def test_a_minimum_alone_masks_what_stops(llm: LLM) -> None:
    """Without a bias or a mask beside it: of all tokens two stop nothing, and only they come before the minimum."""
    stops = [token for token in range(320) if token not in (70, 71)]
    found = ask(llm, [10, 11], min_tokens=4, stop_token_ids=stops)
    assert set(found.token_ids[:4]) <= {70, 71}
    (first,) = ask(llm, [10, 11], max_tokens=1).token_ids
    assert first in stops, "the model's own wish"


def test_each_row_has_its_own_minimum(llm: LLM) -> None:
    """In one batch, prompts and minima of all lengths; one request has none."""
    prompts = [[10 + place] * (1 + 3 * place) for place in range(6)]
    minima = [3, 0, 5, 1, 7, 2]
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, min_tokens=one, logit_bias={END_OF_TEXT: 100.0})
        for one in minima
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(item.outputs[0].token_ids) for item in outputs] == [one + 1 for one in minima]


def test_the_tokenizer_has_both_forms_of_a_word(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert {word: tokenizer.encode(word) for word in MERGED.values()} == {
        word: [token_id] for token_id, word in MERGED.items()
    }


@pytest.mark.parametrize("spelling", ["hi", " hi", "  hi"])
def test_a_bad_word_is_bad_at_the_beginning_and_after_a_space(llm: LLM, spelling: str) -> None:
    wishes = {HI: 60.0, SPACE_HI: 50.0, BYE: 40.0}
    assert ask(llm, [10], ignore_eos=True, logit_bias=wishes).text == "hi" * 12
    assert ask(llm, [10], ignore_eos=True, logit_bias=wishes, bad_words=["bye"]).text == "hi" * 12
    assert ask(llm, [10], ignore_eos=True, logit_bias=wishes, bad_words=[spelling]).text == "bye" * 12
    assert (
        ask(llm, [10], ignore_eos=True, logit_bias={SPACE_HI: 50.0, BYE: 40.0}, bad_words=[spelling]).text == "bye" * 12
    )
    # Before the minimum too, and beside another word.
    found = ask(llm, [10], ignore_eos=True, logit_bias=wishes | {DAY: 45.0}, bad_words=[spelling, "day"], min_tokens=3)
    assert found.text == "bye" * 12


def test_a_bad_word_of_several_tokens_loses_its_last_one(llm: LLM) -> None:
    """ "hi day" is two tokens: its second is masked after its first, and after nothing else. A word of which the prompt
    is the first half may be completed: only generated tokens count, as in vLLM."""
    assert llm.get_tokenizer().encode("hi day") == [HI, SPACE_DAY]
    wishes = {SPACE_DAY: 60.0, BYE: 50.0}
    assert ask(llm, [10, HI], ignore_eos=True, logit_bias=wishes, bad_words=["hi day"]).text == " day" * 12
    found = ask(
        llm, [10], ignore_eos=True, logit_bias={HI: 60.0, SPACE_DAY: 55.0}, bad_words=["hi hi", "hihi", "hi day"]
    )
    assert SPACE_DAY not in found.token_ids and (HI, HI) not in pairwise(found.token_ids)


def test_bad_words_are_those_of_transformers(llm: LLM, judge: Any, model: Path) -> None:
    """Parts of what the model says without them, of one to four tokens, one more in each round. The judge has the words
    in both forms, tokenised by the library itself."""
    library = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    prompt, count, words = [0x2E, 0x2E, 0x0A], 40, list[str]()
    allowed = [0x20, *range(0x61, 0x7B), *MERGED]
    answers = []
    for size in (1, 2, 3, 4, 2, 1, 3, 4, 2):
        found = ask(llm, prompt, max_tokens=count, ignore_eos=True, allowed_token_ids=allowed, bad_words=words or None)
        forms = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
        bad = [library.encode(form, add_special_tokens=False).ids for form in forms]
        expected = judge.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=count,
            suppress_tokens=[token for token in range(320) if token not in allowed], bad_words_ids=bad or None,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert found.token_ids == expected[0, len(prompt) :].tolist()
        answers.append(found.token_ids)
        runs = [found.token_ids[place : place + size] for place in range(count - size)]
        words.append(
            next(text for run in runs if library.encode(text := library.decode(run)).ids == run and text.strip())
        )
    assert all(before != after for before, after in pairwise(answers)), "each word changed the answer"
