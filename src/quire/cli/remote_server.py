"""A running server, Quire's or another of OpenAI's kind, as `quire chat`, `generate` and `explain` speak to it.

The standard library alone: no HTTP client is needed to talk to a server, nor a model to be loaded.
"""

import http.client
import json
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigurationError, InvalidRequestError, OverloadedError, QuireError, RequestFailedError

CONNECT_SECONDS = 10
SILENCE_SECONDS = 600
"""A server that says nothing for this long, the wait in its queue included, is given up."""
MAX_ERROR_BYTES = 2**16


class Server:
    """One server.

    Args:
        url: HOST:PORT will do, for http.

    Raises:
        ConfigurationError: the address is not one.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._port, self._place = parts.port, parts.netloc.rpartition("@")[2]
        except ValueError as error:
            raise ConfigurationError(f"--url is not an address: {error}", field="url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigurationError(
                f"--url must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, got {url!r}", field="url"
            )
        self._host, self._is_secure = parts.hostname, parts.scheme == "https"
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigurationError("--api-key must be printable ASCII", field="api_key")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model_name = ""
        """Which of its models is asked."""

    def first_model(self) -> str:
        """The name of one of its models; errors as for `ask`."""
        models = self.look_up("/v1/models").get("data") or [{}]
        name = models[0].get("id") if isinstance(models[0], dict) else None
        if not isinstance(name, str):
            raise QuireError("the server names no model: --model-name says which to ask")
        return name

    def look_up(self, route: str) -> dict[str, Any]:
        """What the server tells without a body; errors as for `ask`."""
        with closing(self._connect()) as connection:
            return _object(_received(self._send(connection, "GET", route, None).read))

    def ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer.

        Raises:
            QuireError: the server refused or failed, in its own words, or cannot be reached.
        """
        with closing(self._connect()) as connection:
            response = self._send(connection, "POST", route, {"model": self.model_name, **body})
            return _object(_received(response.read))

    def stream(self, route: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of an answer. Closing the iterator closes the connection, which ends the request.

        Raises:
            QuireError: as for `ask`.
        """
        with closing(self._connect()) as connection:
            response = self._send(connection, "POST", route, {"model": self.model_name, **body, "stream": True})
            while line := _received(response.readline):
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _object(data)
                if "error" in event:
                    raise RequestFailedError(_message(event))
                yield event
        raise RequestFailedError("the server closed the stream before its end")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT_SECONDS)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, route: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_SECONDS)
            connection.request(method, self._base + route, data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            hint = "; is quire serve running there?" if isinstance(error, ConnectionRefusedError) else ""
            raise QuireError(f"no answer from {self._place}: {_reason(error)}{hint}") from error
        if response.status != 200:
            raise _refusal(response)
        return response


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _received(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, http.client.HTTPException) as error:
        raise RequestFailedError(f"the server broke off: {_reason(error)}") from error


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise QuireError("the server's answer is not JSON") from error
    if not isinstance(value, dict):
        raise QuireError("the server's answer is not an object")
    return value


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    text = error.get("message") if isinstance(error, dict) else error
    return str(text or "the server gave no reason")[:1000]


def _refusal(response: http.client.HTTPResponse) -> QuireError:
    """The server's refusal as the exception that it would be here."""
    try:
        text = _message(_object(response.read(MAX_ERROR_BYTES)))
    except (QuireError, OSError, http.client.HTTPException):
        text = f"the server answered {response.status} {response.reason}"
    if response.status in (429, 503):
        wait = response.getheader("retry-after", "1")
        return OverloadedError(text, retry_after_s=int(wait) if wait.isdecimal() else 1)
    if 400 <= response.status < 500:
        return InvalidRequestError(text)
    return RequestFailedError(text)
