"""`use_beam_search` over HTTP gives what `LLM.beam_search` gives."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from quire import LLM
from quire.sampling_params import BeamSearchParams
from tests.server.conftest import Running, wait_until
from tests.tiny.checkpoints import make_tiny


def test_the_beams_are_those_of_the_library(real: Running, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "llama", tokenizer=True)
    body = {"prompt": ["Hello", "x y"], "use_beam_search": True, "n": 3, "max_tokens": 6, "length_penalty": 0.5,
            "return_token_ids": True}  # fmt: skip
    answer = httpx.post(f"{real.url}/v1/completions", json=body).json()
    with LLM(str(directory), max_num_seqs=8) as llm:
        expected = llm.beam_search(["Hello", "x y"], BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5))
    found = [(choice["index"], choice["token_ids"], choice["text"]) for choice in answer["choices"]]
    assert found == [
        (3 * number + choice.index, choice.token_ids, choice.text)
        for number, output in enumerate(expected)
        for choice in output.outputs
    ]
    assert len({tuple(ids) for _, ids, _ in found}) == 6
    assert answer["usage"]["completion_tokens"] == sum(len(ids) for _, ids, _ in found)
    assert wait_until(lambda: not real.engine.has_work)


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"stream": True}, "stream"), ({"temperature": 0.5}, "temperature"), ({"top_p": 0.5}, "top_p"),
     ({"logprobs": 2}, "logprobs"), ({"stop": "x"}, "stop"), ({"n": 20}, "n"), ({"best_of": 4}, "best_of"),
     ({"length_penalty": 11}, "length_penalty"), ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
     ({"response_format": {"type": "json_object"}}, "response_format")],
)  # fmt: skip
def test_what_beams_are_not_for_is_named(real: Running, changes: dict[str, Any], param: str) -> None:
    body = {"prompt": "x", "use_beam_search": True, "n": 2, "max_tokens": 2, **changes}
    response = httpx.post(f"{real.url}/v1/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_client_that_leaves_ends_the_search(real: Running) -> None:
    body = {"prompt": "x", "use_beam_search": True, "n": 8, "max_tokens": 400, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{real.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.2))
    assert wait_until(lambda: not real.engine.has_work)
    late = httpx.post(f"{real.url}/v1/completions", json={**body, "timeout": 0.05})
    assert late.status_code == 408
