"""`select` on SmolLM2-135M-Instruct: its likelihoods are those of transformers in float32 on the same texts."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quire
from quire import LLM
from quire.programs import State, assistant, select, user
from tests.real.conftest import missing_packages

pytestmark = pytest.mark.real
if MISSING := ", ".join(missing_packages()):
    pytest.skip(f"no {MISSING}, which `make test` installs where it can", allow_module_level=True)

TOLERANCE = 1e-3
"""Of a mean log-probability, both computed in float32."""
BEGINNING = 1e-2
"""Of that of a beginning of others: where it goes on as they do almost always, 1 - p has few digits left."""

CASES: list[tuple[str, str, list[str]]] = [
    ("What is the capital of France?", "It is", [" Paris.", " London.", " Berlin.", " a city in Asia."]),
    ("What is the capital of France?", "", ["Paris", "Rome", "The capital of France is Paris."]),
    ("Is water wet? Say yes or no.", "", ["yes", "no", "Yes", "Yes, it is", "Yes, it is wet.", "No"]),
    # The text before ends within what would be one token with the option: " 1969", "un" + "happy".
    ("When was the first landing on the Moon?", "In 19", ["69", "68", "70", "6", "9"]),
    ("Say the opposite of happy.", "It is un", ["happy", "like", "h"]),
    ("Name a fruit.", "Fruit: ", ["apple", "apples", "banana", "app", "car engine"]),
]
"""A question, how the answer begins, and options; "Yes" and "app" are beginnings of others."""


@quire.program
def choose(s: State, question: str, begin: str, options: list[str]) -> None:
    """One choice."""
    s += user(question)
    s += assistant(begin, select("x", options))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def theirs(model: Any, tokenizer: Any, question: str, begin: str, options: list[str]) -> list[float]:
    """The mean log-probability of each option's tokens, those that follow what all texts have in common; an option
    that another begins with has the chance of going on in another way as its last factor."""
    messages = [{"role": "user", "content": question}]
    continued = {"continue_final_message": True, "return_dict": False}
    texts = [
        tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": begin + option}], **continued)
        for option in options
    ]
    prompt = (
        tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": begin}], **continued)
        if begin
        else tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )
    start = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(prompt, *texts, strict=False)))
    scores = []
    for text in texts:
        with torch.inference_mode():
            logprobs = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
        found = [float(logprobs[place - 1, text[place]]) for place in range(start, len(text))]
        nexts = {other[len(text)] for other in texts if len(other) > len(text) and other[: len(text)] == text}
        if nexts:
            found.append(float(torch.log1p(-logprobs[-1, sorted(nexts)].exp().sum())))
        scores.append(sum(found) / len(found))
    return scores


def test_likelihoods_are_those_of_transformers(smollm2: Path, tokenizer: Any) -> None:
    exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    inputs = [dict(zip(("question", "begin", "options"), case, strict=True)) for case in CASES]
    with LLM(model=str(smollm2), dtype="float32", max_num_seqs=32, max_model_len=512) as llm:
        states = choose.run_batch(llm, inputs)
    has_beginnings = healed = 0
    for case, state in zip(CASES, states, strict=True):
        expected = theirs(exact, tokenizer, *case)
        call = state.call("x")
        for option, score in zip(case[2], expected, strict=True):
            begins = any(other != option and other.startswith(option) for other in case[2])
            assert call.scores[option] == pytest.approx(score, abs=BEGINNING if begins else TOLERANCE), (case, option)
        assert call.text == case[2][expected.index(max(expected))]
        has_beginnings += any(one != other and other.startswith(one) for one in case[2] for other in case[2])
        alone = tokenizer.encode(case[1] or "a")
        healed += any(tokenizer.encode(case[1] + option)[: len(alone)] != alone for option in case[2] if case[1])
    assert states[0]["x"] == " Paris."
    assert has_beginnings >= 3
    assert healed >= 1, "some option joins the token before it"
