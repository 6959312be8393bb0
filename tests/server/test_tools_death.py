"""A stream with calls goes on bit for bit after the death of the core."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.isolation.supervisor import SupervisedChannel
from quire.llm import AsyncLLM
from tests.server.conftest import Running, start
from tests.server.test_tool_answers import joined, without_ids
from tests.server.tool_models import make_caller

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 80}
PARAMETERS = {"type": "object", "properties": {"numbers": NUMBERS}, "required": ["numbers"]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "add"}],
    "tools": TOOLS,
    "tool_choice": "required",
    "max_tokens": 900,
    "temperature": 1.0,
    "seed": 7,
    "logprobs": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = make_caller(tmp_path_factory.mktemp("caller") / "model")
    instance = start(AsyncLLM(str(directory), max_num_seqs=4, core_process=True))
    yield instance
    instance.stop()
    instance.engine.close()


def stream(running: Running, kill_after: int | None) -> tuple[list[dict[str, Any]], bool]:
    """The choices of the events, and whether the core died before the last of them was there."""
    choices: list[dict[str, Any]] = []
    killed = False
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=BODY, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices += json.loads(line[6:])["choices"]
            if kill_after is not None and not killed and len(choices) > kill_after:
                channel = running.engine._engine.channel
                assert isinstance(channel, SupervisedChannel) and channel.pid is not None
                os.kill(channel.pid, signal.SIGKILL)
                killed = True
    return choices, killed and len(choices) > (kill_after or 0) + 1


@pytest.mark.parametrize("kill_after", [1, 60])
def test_calls_go_on_where_they_were(running: Running, kill_after: int) -> None:
    undisturbed, _ = stream(running, None)
    expected = joined(undisturbed)
    assert len(json.loads(expected["tool_calls"][0]["function"]["arguments"])["numbers"]) >= 60
    logprobs = [item for choice in undisturbed for item in (choice["logprobs"] or {}).get("content", ())]
    for _ in range(20):  # on a busy machine the core may be done before the kill
        choices, was_in_time = stream(running, kill_after)
        assert without_ids(joined(choices)) == without_ids(expected)
        assert [item for choice in choices for item in (choice["logprobs"] or {}).get("content", ())] == logprobs
        assert choices[-1]["finish_reason"] == "tool_calls"
        if was_in_time:
            return
    raise AssertionError("no kill came in time")
