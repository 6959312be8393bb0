"""Streams of other doors than OpenAI's go on bit for bit after the death of the core."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.isolation.supervisor import SupervisedChannel
from quire.llm import AsyncLLM
from quire.server.doors.all import DOORS
from tests.server.conftest import MODEL, Running, start
from tests.server.tool_models import make_caller

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 80}
PARAMETERS = {"type": "object", "properties": {"numbers": NUMBERS}, "required": ["numbers"]}
ADD: list[Any] = [{"role": "user", "content": "add"}]
TOOLS = [{"name": "add", "input_schema": PARAMETERS}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        **{"model": MODEL, "messages": ADD, "max_tokens": 900, "stream": True, "temperature": 0},
        **{"tools": TOOLS, "tool_choice": {"type": "any"}},
    },
    "/api/chat": {
        **{"model": MODEL, "messages": ADD, "format": PARAMETERS},
        "options": {"temperature": 0, "num_predict": 900},
    },
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = make_caller(tmp_path_factory.mktemp("caller") / "model")
    instance = start(AsyncLLM(str(directory), max_num_seqs=4, core_process=True), apis=DOORS)
    yield instance
    instance.stop()
    instance.engine.close()


def stream(running: Running, path: str, kill_after: int | None) -> tuple[list[dict[str, Any]], bool]:
    """The events, and whether the core died before the last of them was there."""
    events: list[dict[str, Any]] = []
    killed = False
    with httpx.stream("POST", running.url + path, json=BODIES[path], timeout=120) as response:
        for line in response.iter_lines():
            if not line.removeprefix("data: ").startswith("{"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            if kill_after is not None and not killed and len(events) > kill_after:
                channel = running.engine._engine.channel
                assert isinstance(channel, SupervisedChannel) and channel.pid is not None
                os.kill(channel.pid, signal.SIGKILL)
                killed = True
    return events, killed and len(events) > (kill_after or 0) + 1


def said(events: list[dict[str, Any]]) -> Any:
    """What does not depend on how many events it took, or when."""
    text = "".join(
        event["delta"].get("partial_json", event["delta"].get("text", ""))
        if event.get("type") == "content_block_delta"
        else event.get("response", event.get("message", {}).get("content") or "")
        for event in events
        if event.get("type") != "message_start"
    )
    last = next(event for event in reversed(events) if event.get("type") in ("message_delta", None))
    return text, last.get("usage", last.get("eval_count")), last.get("delta", last.get("done_reason"))


@pytest.mark.parametrize("path", BODIES)
def test_streams_go_on_where_they_were(running: Running, path: str) -> None:
    stream(running, path, None)  # so that the cache supplies the same to each that follows
    expected = said(stream(running, path, None)[0])
    assert len(expected[0]) > 60
    for _ in range(20):  # on a busy machine the core may be done before the kill
        events, was_in_time = stream(running, path, 9)
        found = said(events)
        assert found[0] == expected[0] and found[2] == expected[2]
        if was_in_time:
            return
    raise AssertionError("no kill came in time")
