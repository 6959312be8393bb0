"""Every route of a server of several models works with the model that a request names, or with the first: one that
forgot to let the request choose (`ServerContext.of_model`) would have no engine, and answer 500."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from quire.server.dashboard import view
from quire.server.http.context import MarkedRoute
from quire.server.http.models import ServedModel, ServedModels
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/generate": [{"inputs": "x"}],
    "/generate_stream": [{"inputs": "x"}],
    "/": [{"inputs": "x"}],
    "/tokenize": [{"prompt": "x"}, HELLO, {"inputs": "x"}],
    "/chat_tokenize": [HELLO],
    "/detokenize": [{"tokens": [65]}],
    "/api/chat": [HELLO, {}],
    "/api/generate": [{"prompt": "x"}, {}],
    "/api/show": [{}],
    "/v1/messages": [{**HELLO, "max_tokens": 3}],
    "/v1/messages/count_tokens": [HELLO],
    "/v1/chat/completions": [HELLO],
    "/v1/completions": [{"prompt": "x"}],
    "/v1/responses": [{"input": "x"}, {"input": "x", "background": True}],
    "/v1/responses/input_tokens": [{"input": "x"}],
}
"""What a route that computes is asked; the others work with no model, and are asked with an empty body."""
NEEDS_NAME = ("/api/chat", "/api/generate", "/api/show", "/v1/messages", "/v1/messages/count_tokens")
"""Routes whose bodies have to name a model."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engines: dict[str, Any] = {"cat": FakeEngine(), "dog": FakeEngine()}
    models = [ServedModel((name,), frozenset((name,)), engine) for name, engine in engines.items()]
    running = start(ServedModels(models), store=memory(), pages=view(lambda: None))
    yield running
    running.stop()


def routes_of(server: Running) -> list[Route]:
    app: Any = server.server.config.app
    return [route for route in app.routes if isinstance(route, Route)]


def test_each_path_that_computes_is_asked_for_it(server: Running) -> None:
    app: Any = server.server.config.app
    posts = {route.path for route in routes_of(server) if "POST" in (route.methods or ())}
    assert app.state.context.queued_paths <= BODIES.keys() <= posts


@pytest.mark.parametrize("name", [None, "cat", "dog"])
def test_no_route_forgets_to_let_a_request_choose(server: Running, name: str | None) -> None:
    chosen = {} if name is None else {"model": name}
    with httpx.Client(base_url=server.url) as http:
        for route in routes_of(server):
            path = re.sub(r"\{(\w+)(:path)?\}", lambda part: name or "dog" if part[1] == "name" else "x", route.path)
            headers = {route._marker.decode(): "2023-06-01"} if isinstance(route, MarkedRoute) else {}
            for method in sorted(route.methods or ()):
                for body in BODIES.get(route.path, [{}]) if method == "POST" else [None]:
                    json = None if body is None else {**body, **({} if "inputs" in body else chosen)}
                    with http.stream(method, path, params=chosen, json=json, headers=headers) as answer:
                        computes = body is not None and route.path in BODIES
                        expected = 400 if name is None and route.path in NEEDS_NAME else 200
                        is_good = answer.status_code == expected if computes else answer.status_code != 500
                        assert is_good, (method, path, body, answer.status_code, answer.read())
