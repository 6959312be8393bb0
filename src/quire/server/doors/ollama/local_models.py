"""Ollama's routes for models on the server's machine: pull, delete, copy. They are the operator's."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.errors import InvalidRequestError, ModelFileError, ModelNotFoundError, OverloadedError
from quire.server.doors.ollama.bodies import COPY, DELETE, PULL
from quire.server.doors.ollama.respond import ours, resolve
from quire.server.http.context import ServerContext, new_id
from quire.server.http.errors import ApiError
from quire.server.http.limits import RETRY_AFTER_SECONDS
from quire.server.http.local_models import MODEL_CHARACTERS, MOST_ALIASES, NAME_CHARACTERS, LocalModels, LocalState
from quire.server.http.probes import require_admin
from quire.server.http.streams import Deliverable, Framing, deliver

SHOWN_SECONDS = 0.2
"""Between two lines of a pull."""

Body = dict[str, Any]


async def pull(request: Request, framing: Framing) -> Response:
    """Fetch a model to this machine, for a later start. Nothing is to be done for one that is served."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: PULL.read(raw, context.limits))
    found: Deliverable
    try:
        resolve(context, body.model)
        found = _Pulled()
    except ModelNotFoundError:
        if len(body.model) > MODEL_CHARACTERS:
            text = f"model must have at most {MODEL_CHARACTERS} characters, got {len(body.model):,}"
            raise InvalidRequestError(text, param="model") from None
        found = _Pulling(context, _local(request), body.model)
    return await deliver(request, found, framing if body.stream else None)


async def delete(request: Request) -> Response:
    """Forget a name that was copied, or remove a model that is not served from this machine."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: DELETE.read(raw, context.limits))
    require_admin(request)
    if context.local.aliases.pop(_bare(body.model), None) is not None:
        return Response()
    if ours(context, body.model) in context.accepted_names:
        raise InvalidRequestError("the model of a running server stays", param="model")
    models = _local(request)
    try:
        await asyncio.to_thread(_remove, models, body.model, context.accepted_names, _directories(context))
    except ModelFileError as error:
        raise ApiError(404, str(error), code="model_not_found", param="model") from error
    return Response()


async def copy(request: Request) -> Response:
    """Give a served model a further name, until the server stops."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: COPY.read(raw, context.limits))
    require_admin(request)
    resolve(context, body.source)
    name, aliases = _bare(body.destination), context.local.aliases
    if not 0 < len(name) <= NAME_CHARACTERS or not name.isprintable():
        raise InvalidRequestError(f"destination must have 1 to {NAME_CHARACTERS} characters", param="destination")
    if name in context.accepted_names:
        raise InvalidRequestError(f"destination {name!r} is a served name already", param="destination")
    if name not in aliases and len(aliases) >= MOST_ALIASES:
        raise ApiError(429, f"copies are limited to {MOST_ALIASES} names", code="too_many_names", param="destination")
    aliases[name] = ours(context, body.source)
    return Response()


def _bare(name: str) -> str:
    return name.removesuffix(":latest")


def _local(request: Request) -> LocalModels:
    """What an operator may fetch to and remove from."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    if context.local.models is None:
        raise ApiError(400, "this server fetches and removes no models", code="unsupported_route", param="model")
    return context.local.models


def _directories(context: ServerContext) -> set[str]:
    """Where the files of served models are: a core that dies is started anew from them."""
    return {engine.model_files.directory for engine in context.models.engines if engine.model_files is not None}


def _remove(models: LocalModels, name: str, names: frozenset[str], directories: set[str]) -> None:
    """Raises ModelFileError where there is none, InvalidRequestError where a served one has its files."""
    found = {os.path.realpath(one.directory) for one in models.find(name)}
    kept = directories | names  # a name may be a path
    for other in names:  # of those that are being loaded, too
        with suppress(ModelFileError):
            kept |= {os.path.realpath(one.directory) for one in models.find(other)}
    if found & kept:
        raise InvalidRequestError("the model of a running server stays", param="model")
    models.remove(name)


class _Pulled:
    """Of a model that is there."""

    headers = staticmethod(dict[str, str])

    async def whole(self) -> bytes:
        return msgspec.json.encode({"status": "success"})

    async def events(self) -> AsyncGenerator[Body, None]:
        yield {"status": "pulling manifest"}
        yield {"status": "success"}


class _Gone(Exception):
    """The client has left: what has come stays, and the next pull goes on with it."""


class _Pulling(_Pulled):
    """Of one that is fetched meanwhile."""

    def __init__(self, context: ServerContext, models: LocalModels, name: str) -> None:
        self._gate, self._local, self._models, self._name = context.gate, context.local, models, name
        self._seen, self._is_wanted = (0, 0), True

    async def whole(self) -> bytes:
        async for event in self.events():
            last = event
        return msgspec.json.encode(last)

    async def events(self) -> AsyncGenerator[Body, None]:
        if self._local.pulling:
            text = f"{self._local.pulling} is being pulled, and one model is at a time"
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise ApiError(503, text, code="overloaded", headers=headers)
        with self._gate.inside(new_id("pull")):
            self._local.pulling = self._name
            task = asyncio.create_task(asyncio.to_thread(self._models.pull, self._name, self._show))
            task.add_done_callback(partial(_ended, self._local))
            try:
                yield {"status": "pulling manifest"}
                async for event in self._progress(task):
                    yield event
                task.result()
            except ModelFileError as error:
                raise ApiError(400, str(error), code="pull_failed", param="model") from error
            finally:
                self._is_wanted = False
            yield {"status": "success"}

    async def _progress(self, task: "asyncio.Task[object]") -> AsyncGenerator[Body, None]:
        """Until it has ended. Files are checked once all of them are there."""
        shown = (0, 0)
        while not task.done():
            await asyncio.wait({task}, timeout=SHOWN_SECONDS)
            if not self._gate.is_open:
                raise OverloadedError("the server is stopping", retry_after_s=RETRY_AFTER_SECONDS)
            if self._seen != shown:
                shown = self._seen
                yield {"status": f"pulling {self._name}", "completed": shown[0], "total": shown[1]}
                if shown[0] == shown[1]:
                    yield {"status": "verifying sha256 digest"}

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        if not self._is_wanted:
            raise _Gone
        self._seen = done_bytes, total_bytes


def _ended(local: LocalState, task: "asyncio.Task[object]") -> None:
    local.pulling = ""
    if not task.cancelled():
        task.exception()  # so that asyncio does not say that it was never looked at: the client may have left
