"""What the first bytes of a connection are enough for: a refusal, and whose."""

import pytest

from quire.engine.queue import ANYBODY, Caller
from quire.errors import OverloadedError, TooManyRequestsError
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.app import create_app
from quire.server.http.keys import caller_name
from quire.server.http.middleware import EarlyRefusal
from tests.server.fake_engine import FakeEngine

FLOOD = caller_name("flood")


class FullForFlood(FakeEngine):
    """Has no place for one caller, and any number for others."""

    def check_room(self, caller: Caller = ANYBODY) -> None:
        if caller.name == FLOOD:
            raise TooManyRequestsError(f"weight {caller.weight} has 3 waiting", retry_after_s=7)


class Full(FakeEngine):
    """Has no place for anybody."""

    def check_room(self, caller: Caller = ANYBODY) -> None:
        raise OverloadedError("the queue is full", retry_after_s=7)


def head(*fields: str) -> bytes:
    return "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *fields, "", '{"prompt": "x"}']).encode()


def refusal_of(engine: FakeEngine, **options: object) -> EarlyRefusal:
    # `FakeEngine` has the methods that the routes call, and is no `AsyncEngine`.
    app = create_app(engine, apis=[OPENAI], served_model_name="tiny", **options)  # type: ignore[arg-type]
    found = app.state.early_refusal
    assert isinstance(found, EarlyRefusal)
    return found


def test_the_key_tells_who_is_refused() -> None:
    refusal = refusal_of(FullForFlood(), api_key={"flood": 3, "guest": 1})
    answer = refusal(head("authorization:Bearer flood ")) or b""
    assert answer.startswith(b"HTTP/1.1 429 ") and b"weight 3" in answer and b"Retry-After: 7\r\n" in answer
    assert refusal(head("Authorization: Bearer guest")) is None
    assert (refusal(head("X-API-Key: flood")) or b"").startswith(b"HTTP/1.1 429 ")
    assert refusal(head("x-api-key: guest")) is None


@pytest.mark.parametrize(
    "data",
    [
        head(),
        head("Authorization: Bearer unknown"),
        head("Authorization: Basic flood"),
        head("Authorization: Bearer flood", "Authorization: Bearer flood"),
        head("Authorization : Bearer flood"),
        head("Authorization: Bearer", " flood"),
        head("Authorization: Bearer flood", " and more"),
        head("Authorization: Bearer flood", "\tand more"),
    ],
)
def test_what_is_not_plain_is_left_to_the_parser(data: bytes) -> None:
    """With its 401 or 400, or the same refusal."""
    assert refusal_of(FullForFlood(), api_key={"flood": 1, "guest": 1})(data) is None


def test_without_keys_all_are_one_caller() -> None:
    assert (refusal_of(Full())(head("Authorization: Bearer of-a-proxy")) or b"").startswith(b"HTTP/1.1 503 ")
