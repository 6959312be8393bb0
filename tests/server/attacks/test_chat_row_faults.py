"""One bad request hurts one request, through the chat route: the faults of `tests/law/test_row_faults.py` over HTTP."""

import asyncio
from typing import Any

import httpx
import pytest

from quire import AsyncLLM
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.app import create_app
from tests.law.test_row_faults import MARK, POINTS, SEED, Victim, directory, engine

__all__ = ["directory"]

SHARED = "a beginning that two of them share, and longer than one step of sixty-four tokens, "
VICTIM = {
    "request_id": "victim", "messages": [{"role": "user", "content": SHARED + chr(MARK) * 9}], "max_tokens": 20,
    "ignore_eos": True, "seed": SEED, "temperature": 1.0, "logprobs": True, "top_logprobs": 7,
    "min_tokens": 5, "stop": ["\0never"], "logit_bias": {"5": 1.0}, "allowed_token_ids": list(range(100)),
    "bad_words": ["hello world"], "presence_penalty": 0.5, "typical_p": 0.95,
}  # fmt: skip
CANARIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": SHARED}], "temperature": 0},
    {
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 3,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 2,
    },
    {"messages": [{"role": "user", "content": "b" * 30}], "seed": 4, "temperature": 1.0, "frequency_penalty": 0.7},
]


HELD = {
    "request_id": "victim", "messages": VICTIM["messages"], "max_tokens": 20, "seed": SEED, "temperature": 1.0,
    "structured_outputs": {"regex": "[a-z ]*!"},
}  # fmt: skip
"""The victim at the points of grammars."""


def ask(engine: AsyncLLM, *, victim: bool, stream: bool, body: dict[str, Any] = VICTIM) -> list[httpx.Response]:
    async def together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(engine, apis=[OPENAI], served_model_name="tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            bodies = [{**canary, "max_tokens": 24, "ignore_eos": True} for canary in CANARIES]
            delivery = {"stream": True} if stream else {"prompt_logprobs": 3}
            bodies = [{**body, **delivery}, *bodies] if victim else bodies
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))

    return asyncio.run(together())


def said(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.fixture(scope="module")
def undisturbed(directory: str) -> list[Any]:
    with engine(directory) as alone:
        return [said(response) for response in ask(alone, victim=False, stream=False)]


@pytest.mark.parametrize("point", POINTS)
def test_one_fault_fails_one_conversation(
    point: str, directory: str, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other point over a stream: what was sent before the fault stays, and an error event ends it."""
    stream = list(POINTS).index(point) % 2 == 1 and point != "prompt logprobs"
    with engine(directory) as under_test:
        with monkeypatch.context() as patch:
            victim = Victim(under_test, patch)
            POINTS[point](victim)
            body = HELD if point.startswith("grammar") else VICTIM
            failed, *canaries = ask(under_test, victim=True, stream=stream, body=body)
            assert victim.num_thrown >= 1
        assert "secret" not in failed.text and "server_error" in failed.text
        assert failed.status_code == 500 or (stream and failed.status_code == 200)
        assert [said(response) for response in canaries] == undisturbed
        assert [said(response) for response in ask(under_test, victim=False, stream=False)] == undisturbed
        under_test.check()
        pool = victim.core.scheduler._pool
        assert pool.num_free == pool.num_blocks and not under_test._streams
