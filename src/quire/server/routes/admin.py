"""What operators see: where the time of a request went.

These routes are apart from those of callers: they answer to the admin key alone, and where there is none, to anybody
on this machine's own loopback, provided that callers need no key either.
"""

import dataclasses
import ipaddress

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.server.context import ServerContext
from quire.server.errors import ApiError
from quire.server.keys import is_admin


def require_admin(request: Request) -> None:
    """Raises ApiError 403 for everybody else."""
    context: ServerContext = request.app.state.context
    if is_admin(request):
        return
    if context.has_admin_key:
        raise ApiError(403, "this route needs the admin key (--admin-api-key)", code="admin_only")
    host = request.client.host if request.client is not None else ""
    if context.weights or not _is_loopback(host):
        text = "this route answers to the admin key alone: start the server with --admin-api-key"
        raise ApiError(403, text, code="admin_only")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def explain_request(request: Request) -> Response:
    """Where the time of a request went, and why: one entry for each prompt of it."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    request_id = request.path_params["request_id"][:128]
    found = context.engine.explain(request_id)
    if not found:
        raise ApiError(404, f"no request {request_id!r} is remembered", code="request_not_found")
    data = [dataclasses.asdict(item) for item in found]
    content = {"object": "list", "data": data}
    return Response(msgspec.json.encode(content), media_type="application/json")


ROUTES = [
    Route("/v1/requests/{request_id}/explain", explain_request),
]
