"""Every field that vLLM's clients may send is honoured, or refused by its name with a reason."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.request_state import RepetitionDetector
from quire.llm import LLM
from quire.sampling_params import RepetitionDetectionParams, SamplingParams
from quire.server.doors.openai.bodies import CHAT, COMPLETION
from quire.server.http.limits import Limits
from tests.server.conftest import MODEL, Running, start
from tests.server.fake_engine import FakeEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
NAMES = """
messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
response_format seed stop stream stream_options temperature top_p tools tool_choice reasoning_effort
parallel_tool_calls user thinking_token_budget include_reasoning use_beam_search top_k min_p repetition_penalty
length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id
session_id return_tokens_as_token_ids return_token_ids return_token_offsets return_prompt_text return_weight_versions
cache_salt kv_transfer_params vllm_xargs repetition_detection stream_interval watermarking
""".split()
"""Of vLLM's ChatCompletionRequest, release 0.33."""
CHAT_ONLY = set(
    """messages top_logprobs tools tool_choice reasoning_effort parallel_tool_calls thinking_token_budget
    include_reasoning add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs""".split()
)
TOOL = {"type": "function", "function": {"name": "f"}}
ASKED: dict[str, Any] = {
    # name: a value that asks for something, and what it needs beside it
    "messages": HELLO, "model": MODEL, "frequency_penalty": 0.5, "logit_bias": {"5": 1}, "logprobs": True,
    "max_tokens": 2, "max_completion_tokens": 2, "n": 2, "presence_penalty": 0.5,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
    "seed": 1, "stop": "x", "stream": False, "temperature": 0.5,
    "top_p": 0.5, "tools": [TOOL], "tool_choice": "none", "reasoning_effort": "high",
    "parallel_tool_calls": False, "user": "me", "thinking_token_budget": 5, "include_reasoning": False,
    "use_beam_search": True, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "length_penalty": 2.0,
    "stop_token_ids": [5], "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 1,
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 4,
    "prompt_logprobs": 1, "allowed_token_ids": [5, 6], "bad_words": ["x"], "echo": True,
    "add_generation_prompt": True, "add_special_tokens": True, "media_io_kwargs": {"a": 1},
    "mm_processor_kwargs": {"a": 1}, "structured_outputs": {"regex": "a"}, "request_id": "mine-1",
    "session_id": "s", "return_tokens_as_token_ids": True, "return_token_ids": True, "return_token_offsets": True,
    "return_prompt_text": True, "return_weight_versions": True, "cache_salt": "s",
    "kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1}, "stream_interval": 2, "watermarking": {"a": 1},
    "chat_template_kwargs": {"a": 1}, "repetition_detection": {"max_pattern_size": 2, "min_count": 3},
    "chat_template": "{{ messages[0]['content'] }}", "priority": 0,
}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "logprob_token_ids": {"logprobs": True, "logprob_token_ids": [5, 6]},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "truncation_side": {"truncate_prompt_tokens": 4, "truncation_side": "right"},
    "continue_final_message": {
        "messages": [*HELLO, {"role": "assistant", "content": "so"}],
        "continue_final_message": True,
    },
    "documents": {"documents": [{"title": "a", "text": "b"}], "chat_template": "{{ documents[0].text }}"},
}


@pytest.fixture(scope="module")
def trusting(real: Running) -> Any:
    """The real engine behind a second server, which takes templates."""
    instance = start(real.engine, limits=Limits().with_values({"chat_template_characters": 500}))
    with httpx.Client(base_url=instance.url) as session:
        yield session
    instance.stop()


def _ask(http: httpx.Client, route: str, **body: Any) -> httpx.Response:
    own = {"messages": HELLO} if route == "chat/completions" else {"prompt": "hello"}
    return http.post(f"/v1/{route}", json={**own, "max_tokens": 2, **body})


@pytest.mark.parametrize("name", NAMES)
def test_of_a_chat(trusting: httpx.Client, name: str) -> None:
    body = TOGETHER.get(name) or {name: ASKED[name]}
    if name == "max_completion_tokens":
        body = {**body, "max_tokens": None}
    response = _ask(trusting, "chat/completions", **body)
    if name in CHAT.refused:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} is not supported: ")
    elif name == "thinking_token_budget":  # of a model that reasons; see test_tools_client.py
        assert response.status_code == 400 and "hold no reasoning" in response.text
    else:
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", [*(item for item in NAMES if item not in CHAT_ONLY), "prompt_embeds"])
def test_of_a_completion(trusting: httpx.Client, name: str) -> None:
    body = TOGETHER.get(name) or {name: ASKED.get(name, "x")}
    if name == "max_completion_tokens":
        body = {**body, "max_tokens": None}
    if "logprobs" in body:
        body = {**body, "logprobs": 1}
    if name == "length_penalty":
        body = {**body, "use_beam_search": True}
    response = _ask(trusting, "completions", **body)
    if name in COMPLETION.refused:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} is not supported: ")
    else:
        assert response.status_code == 200, response.text


def test_prompt_text_is_what_the_model_reads(trusting: httpx.Client) -> None:
    template = "{% for document in documents %}[{{ document.text }}]{% endfor %}{{ messages[0]['content'] }}"
    body = {"chat_template": template, "documents": [{"text": "one"}, {"text": "two"}], "return_prompt_text": True}
    whole = _ask(trusting, "chat/completions", **body).json()
    assert whole["prompt_text"] == "[one][two]hello"
    events = _ask(trusting, "chat/completions", **body, stream=True).text
    assert events.count('"prompt_text":"[one][two]hello"') == 1


def test_documents_need_a_template_that_reads_them(trusting: httpx.Client) -> None:
    error = _ask(trusting, "chat/completions", documents=[{"text": "one"}]).json()["error"]
    assert (error["param"], "reads no documents" in error["message"]) == ("documents", True)
    assert _ask(trusting, "chat/completions", documents=[]).status_code == 200
    assert _ask(trusting, "chat/completions", documents=[{"text": 5}]).json()["error"]["param"] == "documents"


def test_special_tokens_of_a_chat(trusting: httpx.Client) -> None:
    def ids(**changes: Any) -> list[int]:
        body = {"chat_template": "{{ messages[0]['content'] }}", "return_token_ids": True, **changes}
        found: list[int] = _ask(trusting, "chat/completions", **body).json()["prompt_token_ids"]
        return found

    raw = trusting.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    bare = trusting.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()["tokens"]
    assert (ids(), ids(add_special_tokens=False), ids(add_special_tokens=True)) == (bare, bare, raw)
    asked = {"messages": HELLO, "chat_template": "{{ messages[0]['content'] }}", "add_special_tokens": True}
    assert trusting.post("/tokenize", json=asked).json()["tokens"] == raw


def test_a_template_is_refused_where_it_is_not_trusted(http: httpx.Client) -> None:
    error = _ask(http, "chat/completions", chat_template="x").json()["error"]
    assert (error["param"], error["code"]) == ("chat_template", "chat_template_not_trusted")
    assert "--trust-request-chat-template" in error["message"]


def test_a_name_of_ones_own_is_the_answers(http: httpx.Client) -> None:
    response = _ask(http, "completions", request_id="trace:1.a_B-2")
    assert response.json()["id"] == response.headers["x-request-id"] == "cmpl-trace:1.a_B-2"
    assert _ask(http, "chat/completions", request_id="again").json()["id"] == "chatcmpl-again"
    assert _ask(http, "chat/completions", request_id="again").status_code == 200
    for bad in ("", "a b", "a\r\nb", "a\n", "x" * 65, "ä", 5):
        assert _ask(http, "completions", request_id=bad).json()["error"]["param"] == "request_id"


def test_a_name_is_not_given_twice_at_one_time(http: httpx.Client) -> None:
    slow = {"prompt": "slow", "max_tokens": 60, "stream": True, "request_id": "twin"}
    with http.stream("POST", "/v1/completions", json=slow) as first:
        assert first.status_code == 200
        second = _ask(http, "completions", request_id="twin")
        assert (second.status_code, second.json()["error"]["param"]) == (400, "request_id")
        assert _ask(http, "completions", request_id="other").status_code == 200


def test_the_shorter_of_field_and_header_is_the_timeout() -> None:
    engine = FakeEngine()
    server = start(engine)
    try:
        for field, header, expected in ((None, "7", 7), (5, "7", 5), (9, "7.5", 7.5), (3, None, 3)):
            headers = {} if header is None else {"X-Request-Timeout": header}
            body = {"prompt": "a", "max_tokens": 1, "timeout": field}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
            assert engine.calls[-1]["timeout_s"] == expected
        for bad in ("0", "-1", "soon", "nan", "inf", "1e9"):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Timeout": bad})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")
    finally:
        server.stop()


def test_logprobs_of_named_tokens_are_those_of_the_model(real: Running) -> None:
    client = real.client()
    common: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    best = client.chat.completions.create(**common, top_logprobs=20, extra_body=extra)
    content = best.choices[0].logprobs and best.choices[0].logprobs.content
    assert content
    named = sorted(int(item.token.removeprefix("token_id:")) for item in content[0].top_logprobs)[:18]
    asked = client.chat.completions.create(**common, extra_body={**extra, "logprob_token_ids": named})
    found = asked.choices[0].logprobs and asked.choices[0].logprobs.content
    assert found
    known = {item.token: item.logprob for item in content[0].top_logprobs}
    assert {item.token: item.logprob for item in found[0].top_logprobs} == {
        f"token_id:{token_id}": known[f"token_id:{token_id}"] for token_id in named
    }
    assert all([item.token for item in place.top_logprobs] == [f"token_id:{i}" for i in named] for place in found)
    assert [(item.token, item.logprob) for item in found] == [(item.token, item.logprob) for item in content]


def test_rows_of_one_step_have_their_own_logprobs(tiny_model: Path) -> None:
    named = list(range(2, 40))  # more than are read at one time
    asked = [{}, {"logprobs": 3}, {"logprobs": 0, "logprob_token_ids": named}, {"logprobs": 1}]
    params = [SamplingParams(max_tokens=5, seed=3, ignore_eos=True, **item) for item in asked]  # type: ignore[arg-type]
    with LLM(str(tiny_model)) as llm:
        together = [item.outputs[0] for item in llm.generate([[5, 6, 7]] * 4, params, use_tqdm=False)]
        alone = [llm.generate([[5, 6, 7]], item, use_tqdm=False)[0].outputs[0] for item in params]
    for one, other in zip(together, alone, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert together[0].logprobs is None
    positions = together[2].logprobs
    assert positions is not None and all(set(named) <= set(position) <= {*named, *range(512)} for position in positions)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sequence_that_repeats_itself_ends(real: Running, size: int) -> None:
    answer = real.client().completions.create(
        model=MODEL, prompt="hello", max_tokens=100, temperature=0,
        extra_body={
            "ignore_eos": True, "allowed_token_ids": [65], "return_token_ids": True,
            "repetition_detection": {"max_pattern_size": size, "min_pattern_size": size, "min_count": 4},
        },
    )  # fmt: skip
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("repetition", "repetition_detected")  # type: ignore[attr-defined]
    assert choice.token_ids == [65] * 4 * size  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens == 4 * size


def test_no_repetition_before_the_least_number_of_tokens(real: Running) -> None:
    answer = real.client().completions.create(
        model=MODEL, prompt="hello", max_tokens=30, temperature=0,
        extra_body={
            "ignore_eos": True, "allowed_token_ids": [65], "min_tokens": 12,
            "repetition_detection": {"max_pattern_size": 1, "min_count": 3},
        },
    )  # fmt: skip
    assert answer.usage is not None and answer.usage.completion_tokens == 12


def _repeats(tokens: list[int], params: RepetitionDetectionParams) -> bool:
    """By definition: the last `min_count * size` tokens are one pattern again and again."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        tail = tokens[-size * params.min_count :]
        if len(tail) == size * params.min_count and tail == tail[-size:] * params.min_count:
            return True
    return False


@pytest.mark.parametrize("low,high,count", [(0, 1, 2), (1, 4, 3), (2, 5, 2), (3, 3, 4), (0, 0, 0)])
def test_repetition_is_what_the_definition_says(low: int, high: int, count: int) -> None:
    params = RepetitionDetectionParams(high, low, count)
    watch, tokens, state, hits = RepetitionDetector(params), [], 1, 0
    for step in range(3000):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        tokens.append(step % 5 if step % 211 < 40 else (state >> 16) % (2 if step % 97 < 60 else 5))
        found = watch.push([tokens[-1]])
        assert found == _repeats(tokens, params), step
        hits += found
    assert bool(hits) == bool(high)


@pytest.mark.parametrize(
    "value", [5, [], {"size": 1}, {"max_pattern_size": 257, "min_count": 2}, {"max_pattern_size": 3, "min_count": 1},
              {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, {"max_pattern_size": True}],
)  # fmt: skip
def test_bad_repetition_is_refused(http: httpx.Client, value: Any) -> None:
    error = _ask(http, "completions", repetition_detection=value).json()["error"]
    assert error["param"].startswith("repetition_detection")
