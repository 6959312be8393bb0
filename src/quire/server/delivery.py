"""Sending an answer, in one piece or as a stream, while watching for a caller who left."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.errors import InvalidRequestError
from quire.server.streams import cancel_on_disconnect, start_events


class Answer(Protocol):
    """What the routes make of a request."""

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces."""
        ...

    def headers(self) -> dict[str, str]:
        """Headers of the response, asked for when the answer or its first piece is there."""
        ...


async def deliver(request: Request, answer: Answer, *, stream: bool) -> Response:
    """The response. Errors until the first piece are raised, so that they get a status."""
    if stream:
        return await cancel_on_disconnect(request.receive, start_events(answer.events(), answer.headers))
    content = await cancel_on_disconnect(request.receive, answer.whole())
    return Response(msgspec.json.encode(content), headers=answer.headers(), media_type="application/json")


@contextmanager
def naming_param(engine_name: str, field: str) -> Iterator[None]:
    """Let a refusal of the engine name the field of the body that it came from."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param == engine_name:
            error.param = field
        raise
