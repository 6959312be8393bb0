"""Every error as the wire shows it: its status, OpenAI's four fields, and when to come back."""

import json
import math
from typing import Any

import openai
import pytest

from quire.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    NoTokenLeftError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    TooManyRequestsError,
)
from quire.server.doors.openai.routes import error_body
from quire.server.http.errors import MAX_TEXT, ApiError, as_api_error
from tests.server.conftest import Running

SERVER, CALLER = "server_error", "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequestError("text", param="n"), 400, CALLER, "invalid_value", "n"),
        (PromptTooLongError("text", param="prompt"), 400, CALLER, "context_length_exceeded", "prompt"),
        (ModelNotFoundError("text"), 404, CALLER, "model_not_found", "model"),
        (NoTokenLeftError("text"), 400, CALLER, "no_token_left", None),
        (DeadlineExceededError("text"), 408, CALLER, "deadline_exceeded", "timeout"),
        (TooManyRequestsError("text", retry_after_s=3), 429, CALLER, "rate_limit_exceeded", None),
        (RequestFailedError("text"), 500, SERVER, "request_failed", None),
        (OverloadedError("text", retry_after_s=3), 503, SERVER, "overloaded", None),
        (ApiError(418, "text", param="p", code="teapot"), 418, CALLER, "teapot", "p"),
    ],
)
def test_each_error_has_its_status_and_its_words(
    error: Exception, status: int, kind: str, code: str, param: str | None
) -> None:
    found = as_api_error(error)
    assert found.status == status
    assert error_body(found) == {"error": {"message": "text", "type": kind, "param": param, "code": code}}
    assert ("Retry-After" in found.headers) is (status in (429, 503))


@pytest.mark.parametrize("error", [EngineDeadError("a secret"), KeyError("a secret"), ValueError("a secret")])
def test_the_text_of_what_is_the_engines_fault_stays_inside(error: Exception) -> None:
    found = as_api_error(error)
    assert found.status == 500 and "secret" not in json.dumps(error_body(found))
    assert error_body(found)["error"]["type"] == SERVER


@pytest.mark.parametrize("kind", [OverloadedError, TooManyRequestsError])
@pytest.mark.parametrize("wait_s", [0, 0.2, 1, 1.0001, 1.5, 1.9999, 2, 59.01, 600])
def test_the_time_to_come_back_is_whole_seconds_and_never_too_short(kind: Any, wait_s: float) -> None:
    """RFC 9110, 10.2.3: `Retry-After` is a whole number of seconds, and a client that comes earlier comes too early."""
    found = as_api_error(kind("text", retry_after_s=wait_s)).headers["Retry-After"]
    assert found.isdecimal() and max(1, wait_s) <= int(found) < max(1, wait_s) + 1
    assert int(found) == max(1, math.ceil(wait_s))


def test_a_text_is_as_long_as_it_may_be_and_no_longer() -> None:
    for length in (MAX_TEXT, MAX_TEXT + 1, 10 * MAX_TEXT):
        text = error_body(ApiError(400, "x" * length))["error"]["message"]
        assert text == "x" * MAX_TEXT + ("..." if length > MAX_TEXT else "")


def test_a_plain_answer_is_a_whole_response_that_ends_the_connection() -> None:
    error = ApiError(429, "text", code="rate_limit_exceeded", headers={"Retry-After": "7"})
    head, _, content = error.plain(error_body(error)).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 429 Too Many Requests"
    assert fields == {
        "Retry-After": "7", "content-type": "application/json", "connection": "close",
        "content-length": str(len(content)),
    }  # fmt: skip
    assert json.loads(content) == error_body(error)


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/models/x", "/nothing"])
def test_a_base_url_without_its_v1_is_told(running: Running, path: str) -> None:
    client = running.client().with_options(base_url=running.url)
    with pytest.raises(openai.NotFoundError, match=f"there is no route {path}") as caught:
        client.post(path, cast_to=object)
    assert (f"did you mean /v1{path}?" in caught.value.message) is (path != "/nothing")
