"""The server's application: routes, errors and the key, put together around an engine."""

import hashlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.errors import ConfigurationError
from quire.server import errors, limits
from quire.server.context import Gate, ServerContext
from quire.server.errors import ApiError
from quire.server.metrics import make_registry
from quire.server.routes import chat, completions, health, models

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine


def create_app(
    engine: "AsyncEngine",
    *,
    served_model_name: str | Sequence[str],
    model_names: Sequence[str] = (),
    api_key: str | None = None,
    metrics_prefix: str = "quire",
    show_cached_tokens: bool = False,
    max_requests_in_flight: int = limits.REQUESTS_IN_FLIGHT,
) -> FastAPI:
    """An ASGI application. The caller keeps the engine and shuts it down.

    Args:
        served_model_name: names shown by /v1/models; the first stands for requests that name none.
        model_names: further names that requests may use (the model's directory, its id on the hub).
        api_key: when set, every route but the probes needs `Authorization: Bearer KEY`.
        metrics_prefix: stands before the colon of every metric's name.
        show_cached_tokens: usage tells how many prompt tokens the prefix cache supplied.

    Raises:
        ConfigurationError: no name, or an empty key.
    """
    names = (served_model_name,) if isinstance(served_model_name, str) else tuple(served_model_name)
    if not names or not all(names):
        raise ConfigurationError("served_model_name must not be empty", field="served_model_name")
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("api_key must not be empty", field="api_key")
    app = FastAPI(title="Quire", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.context = ServerContext(
        engine=engine,
        served_names=names,
        accepted_names=frozenset(names) | frozenset(model_names),
        gate=Gate(max_requests_in_flight),
        show_cached_tokens=show_cached_tokens,
    )
    app.state.registry = make_registry(engine, names[0], metrics_prefix)
    errors.install(app)
    for module in (completions, chat, models, health):
        app.include_router(module.router)
    if api_key is not None:
        app.add_middleware(_KeyRequired, api_key=api_key)
    return app


class _KeyRequired:
    """Lets nothing but the probes through without the key. Deny is the default: new routes need it too."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "lifespan" or scope["path"] in health.OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = "this server needs an API key: send it as 'Authorization: Bearer KEY'"
        refusal = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refusal.response()(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        """Digests are compared, in a time that does not depend on where they differ."""
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        matches = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        return bool(scheme.lower() == b"bearer" and matches)
