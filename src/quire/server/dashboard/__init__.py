"""The live view at /ui: pages that hold nothing, and frames of what the engine does for operators.

The pages are plain files, open to all who reach the server; what they show comes from /ui/frame and /ui/frames, which
answer as `explain` does: to this machine alone where there are no keys, to the admin key otherwise. A viewer that reads
slowly gets fewer frames; the engine waits for none. Of several models it shows the first, or that of `?model=NAME`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from quire.server.http.context import Pages, ServerContext
from quire.server.http.errors import ApiError
from quire.server.http.probes import require_admin

FRAME_S = 0.2
"""Between two frames of a stream."""
SLOWEST_S, FASTEST_S = 2.0, 0.1
MOST_VIEWERS = 8
"""Streams at one time."""
PAGES = {
    "/ui": ("index.html", "text/html"),
    "/ui/app.js": ("app.js", "text/javascript"),
    "/ui/playground.js": ("playground.js", "text/javascript"),
    "/ui/views.js": ("views.js", "text/javascript"),
    "/ui/words.js": ("words.js", "text/javascript"),
    "/ui/style.css": ("style.css", "text/css"),
}
OPEN_PATHS = frozenset(PAGES) | {"/ui/"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'"
)


async def page(request: Request) -> Response:
    """One of the view's files."""
    name, kind = PAGES[request.url.path]
    content = await asyncio.to_thread((files(__package__) / "static" / name).read_bytes)
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=kind, headers=headers)


async def to_page(request: Request) -> Response:
    """/ui/ is /ui."""
    return RedirectResponse("/ui", 308)


def _number(request: Request, name: str, usual: float, low: float, high: float) -> float:
    text = request.query_params.get(name)
    try:
        value = usual if text is None else float(text)
    except ValueError:
        value = high + 1
    if not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", code="invalid_value", param=name)
    return value


async def frame(request: Request) -> Response:
    """One frame: what is new since that of version `since`."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    context = context.of_model(request.query_params.get("model"))
    since = int(_number(request, "since", -1, -1, 2**53))
    return Response(msgspec.json.encode(_frame(context, since)), media_type="application/json")


async def frames(request: Request) -> Response:
    """Frames as server-sent events, one in `every` seconds, until the viewer goes."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    context = context.of_model(request.query_params.get("model"))
    every_s = _number(request, "every", FRAME_S, FASTEST_S, SLOWEST_S)
    viewers: set[object] = request.app.state.viewers
    if len(viewers) >= MOST_VIEWERS:
        raise ApiError(429, f"{MOST_VIEWERS} viewers are open, which is the most", code="too_many_viewers")
    return StreamingResponse(
        _events(context, every_s, viewers), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def static_batches(request: Request) -> Response:
    """How fast the last requests would have been in static batches."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    context = context.of_model(request.query_params.get("model"))
    observer, longest = context.engine.observer, context.engine.max_model_len
    found = await asyncio.to_thread(observer.static_batches, longest)  # None: too few have ended
    return Response(msgspec.json.encode(found), media_type="application/json")


async def _events(context: ServerContext, every_s: float, viewers: set[object]) -> AsyncIterator[bytes]:
    """Each frame is made when the last one was taken."""
    viewer, since = object(), -1
    viewers.add(viewer)
    try:
        while context.gate.is_open:
            found = _frame(context, since)
            since = found["version"]
            yield b"data: " + msgspec.json.encode(found) + b"\n\n"
            await asyncio.sleep(every_s)
    finally:
        viewers.discard(viewer)


def _frame(context: ServerContext, since: int) -> dict[str, Any]:
    found = dict(context.engine.observer.live(since))
    if not found:
        raise ApiError(404, "this installation has no quire.observe", code="not_observed")
    return {
        **found,
        "model": context.served_names[0],
        "max_model_len": context.engine.max_model_len,
        "is_ready": context.is_ready,
    }


Endpoint = Callable[[Request], Awaitable[Response]]


def _at_port(endpoint: Endpoint, port: int | None) -> Endpoint:
    """What answers at that port alone; None: at every one."""
    if port is None:
        return endpoint

    async def answer(request: Request) -> Response:
        if request.scope["server"][1] != port:
            raise ApiError(404, f"the live view is at port {port}", code="not_found")
        return await endpoint(request)

    return answer


def view(
    read_rates: Callable[[], Sequence[tuple[float, float]] | None] = lambda: None, port: int | None = None
) -> Pages:
    """The pages and what they read.

    Args:
        read_rates: bytes a second that this machine's memory gives, by the bytes that are read over and over; None: not
            measured. Reads a file.
        port: where alone the view answers.
    """

    async def machine(request: Request) -> Response:
        require_admin(request)
        found = {"read": await asyncio.to_thread(read_rates)}
        return Response(msgspec.json.encode(found), media_type="application/json")

    routes: dict[str, Endpoint] = {
        **dict.fromkeys(PAGES, page),
        "/ui/": to_page,
        "/ui/frame": frame,
        "/ui/frames": frames,
        "/ui/static": static_batches,
        "/ui/machine": machine,
    }
    return Pages(tuple(Route(path, _at_port(one, port)) for path, one in routes.items()), OPEN_PATHS)


VIEW = view()
"""At every port, of a machine that was not measured."""
