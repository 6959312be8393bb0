"""/v1/completions: a gap to fill (`suffix`), and the best of several sequences (`best_of`)."""

import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import AddedToken

from quire.errors import InvalidRequestError
from quire.text.fill_in import FORMS, encode_gap
from quire.text.tokenizer import Tokenizer
from tests.server.conftest import Running

FORM_NAMES = ("qwen", "starcoder", "santacoder", "deepseek")


def make_tokenizer(directory: Path, contents: tuple[str, ...], *, special: bool, bos: bool) -> Tokenizer:
    """Byte-level, as those of code models are."""
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {sign: number for number, sign in enumerate(sorted(pre.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre, tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.add_tokens([AddedToken(text, special=special) for text in contents])
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_a_gap_stands_between_the_tokens_of_its_form(form: Any, bos: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, tuple(form), special=not bos, bos=bos)
    ids = encode_gap(tokenizer, "a b", " c", add_special_tokens=True)
    written = f"{'<s>' * bos}{form.prefix}a b{form.suffix} c{form.middle}"  # as the model cards write it
    assert tokenizer.decode(ids, skip_special_tokens=False) == written
    assert ids == tokenizer.encode(written, add_special_tokens=False)
    assert encode_gap(tokenizer, "a b", " c", add_special_tokens=False) == ids[bos:]


def test_a_tokenizer_without_the_tokens_is_told(tmp_path: Path, real: Running) -> None:
    tokenizer = make_tokenizer(tmp_path, FORMS[0][:2], special=True, bos=False)
    with pytest.raises(InvalidRequestError, match="suffix is not supported"):
        encode_gap(tokenizer, "a", "b", add_special_tokens=True)
    response = httpx.post(f"{real.url}/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "suffix"


def test_the_suffix_reaches_the_prompt(http: httpx.Client) -> None:
    asked = {"prompt": ["a", "bc"], "suffix": "d", "return_token_ids": True, "max_tokens": 2}
    choices = http.post("/v1/completions", json=asked).json()["choices"]
    assert [bytes(choice["prompt_token_ids"]) for choice in choices] == [b"a|d", b"bc|d"]
    for body, word in (({"echo": True}, "echo"), ({"prompt": [1, 2]}, "text"), ({"suffix": 3}, "string")):
        refused = http.post("/v1/completions", json={**asked, **body})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
        assert word in refused.json()["error"]["message"]


def test_the_best_are_given_best_first(real: Running) -> None:
    body = {"prompt": ["Hello", "x"], "max_tokens": 6, "seed": 3, "temperature": 1.5, "logprobs": 0}
    several = httpx.post(f"{real.url}/v1/completions", json={**body, "n": 5}).json()
    best = httpx.post(f"{real.url}/v1/completions", json={**body, "n": 2, "best_of": 5}).json()
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]

    def mean(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return math.fsum(logprobs) / len(logprobs)

    for prompt in range(2):
        ranked = sorted(several["choices"][5 * prompt : 5 * prompt + 5], key=mean, reverse=True)
        given = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [one["text"] for one in given] == [one["text"] for one in ranked[:2]]
    assert best["usage"]["completion_tokens"] == several["usage"]["completion_tokens"], "what was sampled is counted"
    bare = httpx.post(f"{real.url}/v1/completions", json={**body, "n": 1, "best_of": 5, "logprobs": None}).json()
    assert bare["choices"][0]["logprobs"] is None and bare["choices"][0]["text"] == best["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [({"best_of": 3, "stream": True}, "best_of"), ({"best_of": 129}, "n"), ({"n": 3, "best_of": 2}, "best_of"),
     ({"prompt": ["a"] * 3, "best_of": 100}, "n")],
)  # fmt: skip
def test_what_best_of_is_refused_for(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", **body})
    assert response.status_code == 400 and response.json()["error"]["param"] == param
