"""What operators see: where the time of a request went.

These routes are apart from those of callers: they answer to the admin key alone, and where there is none, to anybody
on this machine's own loopback, provided that callers need no key either.
"""

import dataclasses
import ipaddress

import msgspec
from fastapi import APIRouter, Request, Response

from quire.server.context import ServerContext
from quire.server.errors import ApiError
from quire.server.keys import is_admin

router = APIRouter()


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


@router.get("/v1/requests/{request_id}/explain")
async def explain_request(request: Request, request_id: str) -> Response:
    """Where the time of a request went, and why: one entry for each prompt of it."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    found = context.engine.explain(request_id[:128])
    if not found:
        raise ApiError(404, f"no request {request_id[:128]!r} is remembered", code="request_not_found")
    data = [dataclasses.asdict(item) for item in found]
    content = {"object": "list", "data": data}
    return Response(msgspec.json.encode(content), media_type="application/json")
