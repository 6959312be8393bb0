"""Routes of OpenAI's API that are known and not honoured."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.server.http.errors import ApiError

_REASONS = {
    "/v1/embeddings": "this version makes no vectors",
    "/v1/moderations": "this version judges no content",
    "/v1/images/{rest:path}": "this server makes no images",
    "/v1/audio/{rest:path}": "this server reads and writes text only",
    "/v1/fine_tuning/{rest:path}": "a server trains no models",
}


async def refuse(request: Request, reason: str) -> Response:
    """Say why.

    Raises:
        ApiError: always.
    """
    path = ascii(request.scope["path"][:64])[1:-1]
    raise ApiError(400, f"{path} is not supported: {reason}", code="unsupported_route")


ROUTES = tuple(
    Route(path, partial(refuse, reason=reason), methods=["GET", "POST", "DELETE"] if "{" in path else ["POST"])
    for path, reason in _REASONS.items()
)
