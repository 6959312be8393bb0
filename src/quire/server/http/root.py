"""`GET /`: what this is, and links on. JSON, or a small page for a browser."""

from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

import quire
from quire.server.http.context import ServerContext

LINKS = {
    "models": "/v1/models",
    "openapi": "/openapi.json",
    "metrics": "/metrics",
    "version": "/version",
    "ready": "/readyz",
}
VIEW = {"live view": "/ui"}
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Quire</title>
<body style="font: 16px/1.5 sans-serif; max-width: 40em; margin: 3em auto">
<h1>Quire {version}</h1>
<p>An inference engine for large language models, serving {models}.
Clients of OpenAI's API take this address and <code>/v1</code> as their base URL; those of Anthropic's and of Ollama's
take this address alone.</p>
<ul>{links}</ul>
</body></html>
"""


async def index(request: Request) -> Response:
    """For a person, or a program that looks around."""
    context: ServerContext = request.app.state.context
    links = LINKS | (VIEW if any(route.path == VIEW["live view"] for route in request.app.routes) else {})
    content: dict[str, Any] = {
        "name": "quire",
        "version": quire.__version__,
        "models": list(context.served_names),
        "base_path": "/v1",
        "links": links,
    }
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse(content, headers={"Vary": "Accept"})
    items = "".join(f'<li><a href="{path}">{name}</a></li>' for name, path in links.items())
    models = ", ".join(f"<b>{escape(name)}</b>" for name in context.served_names)
    page = _PAGE.format(version=quire.__version__, models=models, links=items)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return HTMLResponse(page, headers={"Vary": "Accept", "Content-Security-Policy": policy})
