"""One bad request hurts one request, on the way in and out: faults at named points of the routes and of the encoding.

At each point the work of one answer raises. That request gets its own 500, or an error event once its stream has
begun, without the text of the fault; others beside it get what they always get; nothing runs on.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from quire.server.doors.openai import respond, routes
from quire.server.http import streams
from tests.server.conftest import Running, wait_until

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}
MARK = "c0ffee"
"""In the prompt of the victim."""


class Fault(Exception):
    """Thrown on purpose."""


class Encoder:
    """msgspec, which encodes the first `num_good` parts of the victim's answer and no more."""

    def __init__(self, num_good: int) -> None:
        self._num_left = num_good
        self._victim: str | None = None
        self.json, self.Raw = self, msgspec.Raw

    def encode(self, value: Any) -> bytes:
        data = msgspec.json.encode(value)
        if MARK.encode() in data and "id" in value:  # the prompt is echoed in the first part
            self._victim = value["id"]
        if self._victim is not None and value.get("id") == self._victim:
            self._num_left -= 1
            if self._num_left < 0:
                raise Fault("secret text of the fault")
        return data


def throws(plain: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        if any(MARK in repr(arg) for arg in (*args, *kwargs.values())):
            raise Fault("secret text of the fault")
        return plain(*args, **kwargs)

    return function


def parsing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routes, "parse_completion", throws(routes.parse_completion))
    patch.setattr(routes, "parse_chat", throws(routes.parse_chat))


def asked(answer: Any) -> Any:
    return getattr(answer._call, "prompts", None) or answer._call.conversation


def in_answers(patch: pytest.MonkeyPatch, **names: Any) -> None:
    """The method of each route's answer throws for the victim."""
    for route, name in names.items():
        kind = {"completions": respond.CompletionAnswer, "chat": respond.ChatAnswer}[route]
        plain = getattr(kind, name)

        def method(self: Any, *args: Any, plain: Any = plain) -> Any:
            throws(lambda _: None)(asked(self))
            return plain(self, *args)

        patch.setattr(kind, name, method)


def making(patch: pytest.MonkeyPatch) -> None:
    in_answers(patch, completions="_choice", chat="_token_ids")


def encoding(num_good: int) -> Callable[[pytest.MonkeyPatch], None]:
    def install(patch: pytest.MonkeyPatch) -> None:
        encoder = Encoder(num_good)
        patch.setattr(streams, "msgspec", encoder)
        patch.setattr(respond, "msgspec", encoder)

    return install


def heading(patch: pytest.MonkeyPatch) -> None:
    in_answers(patch, completions="headers", chat="headers")


POINTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {
    "parsing": (parsing, False),
    "parsing, streamed": (parsing, True),
    "making": (making, False),
    "making, streamed": (making, True),
    "encoding": (encoding(0), False),
    "encoding the first event": (encoding(0), True),
    "encoding a later event": (encoding(1), True),
    "headers": (heading, False),
    "headers, streamed": (heading, True),
}


VICTIM = {**BODY, "max_tokens": 60, "echo": True}
ROUTES: dict[str, dict[str, Any]] = {
    "completions": {**VICTIM, "prompt": f"{MARK} hello"},
    "chat/completions": {
        **{name: value for name, value in VICTIM.items() if name not in ("prompt", "logprobs")},
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": MARK}],
        **{"add_generation_prompt": False, "continue_final_message": True},
    },
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("point", POINTS)
def test_one_fault_fails_one_answer(point: str, route: str, real: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    install, stream = POINTS[point]
    with httpx.Client(base_url=real.url) as http:
        canary = choices(http)
        found: list[Any] = []
        others = [threading.Thread(target=lambda: found.append(choices(http))) for _ in range(3)]
        with monkeypatch.context() as patch:
            install(patch)
            for other in others:
                other.start()
            response = http.post(f"/v1/{route}", json={**ROUTES[route], "stream": stream})
            for other in others:
                other.join()
        assert found == [canary] * 3
        assert "secret" not in response.text
        if point == "encoding a later event":
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
            assert response.status_code == 200 and json.loads(events[-1])["error"]["type"] == "server_error"
        else:
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert choices(http) == canary
    assert wait_until(lambda: not real.engine.has_work and not real.server._context.gate.num_inside)


def choices(http: httpx.Client) -> Any:
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 200, response.text
    return response.json()["choices"]
