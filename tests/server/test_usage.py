"""Usage against tokens that are counted by hand: whole and streamed, on both routes, for several sequences and prompts.

The OpenAI API says of `stream_options.include_usage`: one more event before `[DONE]`, whose choices are empty and whose
usage is that of the whole request; all others have a usage that is null.
"""

import json
from typing import Any

import httpx
import pytest

from quire.outputs import CompletionOutput, RequestMetrics, RequestOutput
from quire.server.doors.openai.usage import Usage

HELLO = [{"role": "user", "content": "hello"}]
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("completions", {"prompt": "abc"}, 3),
    ("completions", {"prompt": "abc", "n": 3}, 3),
    ("completions", {"prompt": ["abc", "de", "f"]}, 6),
    ("completions", {"prompt": ["abc", "defgh"], "n": 2}, 8),
    ("chat/completions", {"messages": HELLO}, len("user: hello\n")),
    ("chat/completions", {"messages": HELLO, "n": 3}, len("user: hello\n")),
]
"""Route, body, prompt tokens: one a byte, and each prompt once whatever `n` is."""
IDS = [f"{route}-{body}" for route, body, _ in CASES]
NUM_TOKENS = 5


def sequences_of(body: dict[str, Any]) -> int:
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [0]
    return len(prompts) * int(body.get("n", 1))


def streamed(http: httpx.Client, route: str, body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    response = http.post(f"/v1/{route}", json={**body, "max_tokens": NUM_TOKENS, "stream": True, **options})
    assert response.status_code == 200, response.text
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def counted(usage: dict[str, Any], prompt: int, answer: int) -> bool:
    """The three numbers."""
    return [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [
        prompt, answer, prompt + answer,
    ]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "prompt"), CASES, ids=IDS)
def test_the_whole_answer_counts_each_prompt_once_and_every_token(
    http: httpx.Client, route: str, body: dict[str, Any], prompt: int
) -> None:
    answer = http.post(f"/v1/{route}", json={**body, "max_tokens": NUM_TOKENS}).json()
    assert counted(answer["usage"], prompt, NUM_TOKENS * sequences_of(body))


@pytest.mark.parametrize(("route", "body", "prompt"), CASES, ids=IDS)
def test_the_last_event_has_the_usage_and_all_others_have_null(
    http: httpx.Client, route: str, body: dict[str, Any], prompt: int
) -> None:
    *others, last = streamed(http, route, body, stream_options={"include_usage": True})
    assert last["choices"] == [] and counted(last["usage"], prompt, NUM_TOKENS * sequences_of(body))
    assert all(event["choices"] and "usage" in event and event["usage"] is None for event in others)


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": None}])
@pytest.mark.parametrize(("route", "body", "prompt"), CASES, ids=IDS)
def test_who_does_not_ask_gets_none(
    http: httpx.Client, route: str, body: dict[str, Any], prompt: int, options: dict[str, Any] | None
) -> None:
    more = {} if options is None else {"stream_options": options}
    for event in streamed(http, route, body, **more):
        assert event["choices"] and "usage" not in event


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(("route", "body", "prompt"), CASES, ids=IDS)
def test_continuous_usage_is_what_came_so_far_counted_once(
    http: httpx.Client, route: str, body: dict[str, Any], prompt: int, include_usage: bool
) -> None:
    """However many events the news of one step are: each is at least the tokens that were sent, and at most those of
    the step's siblings more; the last is the whole."""
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    found = streamed(http, route, body, stream_options=options, return_token_ids=True)
    num_sequences, sent, seen = sequences_of(body), 0, []
    for event in found:
        sent += sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
        usage = event["usage"]
        seen.append(usage["completion_tokens"])
        assert sent <= seen[-1] < sent + num_sequences + (event is found[0])
        assert usage["total_tokens"] == usage["prompt_tokens"] + seen[-1] and usage["prompt_tokens"] <= prompt
    assert seen == sorted(seen) and sent == NUM_TOKENS * num_sequences
    assert counted(found[-1]["usage"], prompt, sent)
    assert (found[-1]["choices"] == []) is include_usage


def test_a_prompt_that_is_only_scored_has_no_answer(http: httpx.Client) -> None:
    body = {"prompt": ["abc", "de"], "max_tokens": 0, "echo": True, "logprobs": 0}
    assert counted(http.post("/v1/completions", json=body).json()["usage"], 5, 0)


def news(num_prompt: int, *num_tokens: int, done: bool = False, cached: int = 0, **times: float) -> RequestOutput:
    choices = [
        CompletionOutput(index, "", [1] * count, finish_reason="length" if done else None)
        for index, count in enumerate(num_tokens)
    ]
    metrics = RequestMetrics(times.pop("arrival_s", 0.0), **times) if times else None  # type: ignore[arg-type]
    return RequestOutput("r", None, [1] * num_prompt, choices, done, num_cached_tokens=cached, metrics=metrics)


def test_cached_tokens_are_those_of_every_prompt_and_are_told_where_they_may_be() -> None:
    """The first news of a prompt say what was cached; a later one does not take it back."""
    for shows_cached in (True, False):
        usage = Usage(2, shows_cached=shows_cached)
        for number, output in ((0, news(20, 1, cached=16)), (1, news(40, 1, cached=32)), (0, news(20, 1, cached=0))):
            usage.see(number, output)
        details = usage.counts().get("prompt_tokens_details")
        assert details == ({"cached_tokens": 48} if shows_cached else None)
        assert ("cache_n" in usage.timings()) is shows_cached


def test_timings_are_of_the_whole_answer() -> None:
    """Two prompts, three sequences with 2, 4 and 3 tokens: six gaps; from the first arrival to the last token."""
    usage = Usage(2, shows_cached=True)
    first = {"arrival_s": 10.0, "first_scheduled_s": 11.0, "first_token_s": 13.0, "last_token_s": 14.0}
    second = {"arrival_s": 10.5, "first_scheduled_s": 12.0, "first_token_s": 12.5, "last_token_s": 16.0}
    usage.see(0, news(20, 2, 4, done=True, cached=16, **first))
    assert not usage.finished
    usage.see(1, news(10, 3, done=True, **second))
    assert usage.finished
    found = usage.timings()
    assert (found["queue_ms"], found["ttft_ms"], found["prompt_ms"], found["predicted_ms"]) == (1000, 2500, 1500, 3500)
    assert (found["prompt_n"], found["predicted_n"], found["cache_n"]) == (14, 9, 16)
    assert found["predicted_per_token_ms"] == pytest.approx(3500 / 6, abs=1e-3)
    assert found["predicted_per_second"] == pytest.approx(6 / 3.5, abs=1e-3)
    assert found["prompt_per_token_ms"] == pytest.approx(1500 / 14, abs=1e-3)
    assert usage.server_timing() == "queue;dur=1000, prefill;dur=1500, decode;dur=3500, total;dur=6000"


def test_a_time_that_is_not_known_is_null() -> None:
    usage = Usage(1, shows_cached=False)
    assert usage.timings()["ttft_ms"] is None and usage.server_timing() == ""
    usage.see(0, news(3, 1, done=True, arrival_s=1.0, first_scheduled_s=1.5, first_token_s=2.0, last_token_s=2.0))
    found = usage.timings()
    assert (found["predicted_ms"], found["predicted_per_token_ms"], found["predicted_per_second"]) == (0.0, None, None)
