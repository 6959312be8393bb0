"""The models of a server, each with an engine of its own: a table by name.

A server of one model has its engine from the start. One of several listens while they load: each comes when it is
there, and none waits for another.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from quire.engine.queue import ANYBODY, Caller
from quire.errors import ConfigurationError, OverloadedError
from quire.server.http import limits
from quire.server.http.errors import ApiError

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine

T = TypeVar("T")

GONE = ("failed", "dead")
"""States of a model that answers no more until the server starts anew."""
STATES = ("ready", "loading", "starting", *GONE)


@dataclass(slots=True, eq=False)
class ServedModel:
    """One of them."""

    names: tuple[str, ...]
    """Shown to clients; the first stands in metrics and logs."""
    accepted: frozenset[str]
    """Names that requests may use: those shown, and the model's own."""
    engine: "AsyncEngine | None" = None
    failure: str = ""
    """Why there is no engine, and will be none."""

    @property
    def name(self) -> str:
        """In metrics and logs."""
        return self.names[0]

    @property
    def state(self) -> str:
        """ready, loading, starting (a core follows one that died), failed (it could not be loaded) or dead."""
        if self.engine is None:
            return "failed" if self.failure else "loading"
        if not self.engine.is_healthy:
            return "dead"
        return "ready" if self.engine.is_ready else "starting"

    def require_engine(self) -> "AsyncEngine":
        """Its engine.

        Raises:
            OverloadedError: it is being loaded.
            ApiError: 503, it could not be.
        """
        if self.engine is not None:
            return self.engine
        if self.failure:
            text = f"the model {self.name!r} could not be loaded; the server's log says why"
            raise ApiError(503, text, code="model_failed")
        raise OverloadedError(f"the model {self.name!r} is being loaded", retry_after_s=limits.RETRY_AFTER_SECONDS)


class ServedModels:
    """All of them.

    Raises:
        ConfigurationError: two have a name in common, or one has none.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._all = tuple(models)
        for place, model in enumerate(self._all):
            if not model.names or not all(model.names):
                raise ConfigurationError("served_model_name must not be empty", field="served_model_name")
            for other in self._all[:place]:
                if common := sorted(model.accepted & other.accepted):
                    text = f"served_model_name {common[0]!r} would be that of two models; give each a name of its own"
                    raise ConfigurationError(text, field="served_model_name")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def only(self) -> ServedModel | None:
        """The model of a server that has one; None: requests choose."""
        return self._all[0] if len(self._all) == 1 else None

    @property
    def engines(self) -> "list[AsyncEngine]":
        """Those that are there."""
        return [model.engine for model in self._all if model.engine is not None]

    @property
    def is_healthy(self) -> bool:
        """False once none is left that answers or will: this process can serve nothing any more."""
        return any(model.state not in GONE for model in self._all)

    @property
    def is_ready(self) -> bool:
        """True once each is there or has failed, while at least one answers at once: one that is gone, or whose core
        is being replaced, takes nothing from the others."""
        states = {model.state for model in self._all}
        return "ready" in states and "loading" not in states

    def check_room(self, caller: Caller) -> None:
        """Refuse what no model has a place for, before the body is read that would choose one.

        Raises:
            OverloadedError: all queues are full.
        """
        full: OverloadedError | None = None
        for model in self._all:
            if model.engine is None or model.state == "dead":
                continue  # it has no queue
            try:
                model.engine.check_room(caller)
            except OverloadedError as error:
                full = error
            else:
                return
        if full is not None:
            raise full

    async def beside(self, work: Callable[[], T], size: int, caller: Caller = ANYBODY) -> T:
        """What `work` gives, done beside the event loop before a model is chosen: in the threads of the first engine
        that is there."""
        for engine in self.engines:
            return await engine.beside(work, size, caller)
        return await asyncio.to_thread(work)

    async def shutdown(self) -> None:
        """End all requests."""
        await asyncio.gather(*(engine.shutdown() for engine in self.engines))
