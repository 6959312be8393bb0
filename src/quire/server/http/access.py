"""Around every request: when it came and when its last byte had left, its log record and its trace."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine.observer import Observer
from quire.server.http.keys import caller_of

NOTHING_FOUND: Mapping[str, Any] = MappingProxyType({})

logger = logging.getLogger("quire.access")


class Access:
    """ASGI middleware, outside of all others.

    Args:
        model_of: the name to log of the model that a request chose, empty where there is no choice, and the observer of
            its engine: it is given the times of each response, and it knows what to log of it.
        logs: writes a record for each request (`--enable-log-requests`): sizes and times, no text and no key.
        count: called with each request and its status.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model_of: Callable[[Scope], tuple[str, Observer | None]],
        logs: bool,
        count: Callable[[Scope, int | None], None],
    ) -> None:
        self._app, self._model_of = app, model_of
        self._count = count
        self._logs = logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and take notes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received_s, response = time.monotonic(), _Response()

        async def noting(message: Message) -> None:
            response.note(message)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._finish(scope, response, received_s)

    def _finish(self, scope: Scope, response: "_Response", received_s: float) -> None:
        sent_s = time.monotonic()
        self._count(scope, response.status)
        name, observer = self._model_of(scope)
        found: Mapping[str, Any] = {"model": name} if name else {}
        if response.request_id is not None and observer is not None:
            parent = dict(scope["headers"]).get(b"traceparent")
            found = {**found, **observer.on_sent(response.request_id, caller_of(scope), received_s, sent_s, parent)}
        if self._logs:
            log_request(
                scope["method"],
                scope["path"],
                response.status,
                sent_s - received_s,
                request_id=response.request_id,
                is_complete=response.is_complete,
                found=found,
            )


def log_request(
    method: str,
    path: str,
    status: int | None,
    seconds: float,
    *,
    request_id: str | None = None,
    is_complete: bool = True,
    found: Mapping[str, Any] = NOTHING_FOUND,
) -> None:
    """Write the record of one request."""
    fields = {
        "method": method,
        "path": ascii(path)[1:-1][:128],
        "status": status,
        "request_id": request_id,
        "seconds": round(seconds, 6),
        "is_complete": is_complete,
        **found,
    }
    logger.info("request", extra={"fields": fields})


class _Response:
    """What passed by of a response."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.request_id: str | None = None
        self.is_complete = False

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message.get("headers", ()):
                if name == b"x-request-id":
                    self.request_id = value.decode("latin-1")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, logger and message, and the fields that it brings."""
        content: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class TextFormatter(logging.Formatter):
    """One line for people; the fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        shown = [f"{name}={value}" for name, value in getattr(record, "fields", {}).items()]
        return " ".join([super().format(record), *shown])


LOG_FORMATS = {"text": TextFormatter, "json": JsonFormatter}


def configure_logs(log_format: str, *, requests: bool) -> None:
    """What `quire` logs goes to standard error in one of `LOG_FORMATS`: warnings, and with `requests` each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(LOG_FORMATS[log_format]())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO if requests else logging.WARNING)
