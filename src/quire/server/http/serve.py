"""Running the application under uvicorn, and stopping it without cutting a request off.

On SIGTERM or SIGINT: /readyz says 503 and new requests are refused; those that run have `drain_s` seconds to finish,
then the engine ends them with an error; then the process leaves with status 0. A second signal leaves at once.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from quire.server.http import limits
from quire.server.http.connections import bounded_protocol
from quire.server.http.context import ServerContext
from quire.server.http.jobs import RESUMABLE
from quire.server.http.listen import ACCEPT_BATCH

FLUSH_SECONDS = 3
"""For bytes on their way after the last request ended."""


class GracefulServer(uvicorn.Server):
    """uvicorn that drains before it closes its sockets, and that does not die of the signal it handled."""

    def __init__(
        self,
        app: Starlette,
        *,
        drain_s: float = limits.DRAIN_SECONDS,
        header_s: float = limits.HEADER_SECONDS,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._context: ServerContext = app.state.context
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(header_s, app.state.early_refusal, self._context),  # type: ignore[arg-type]
                backlog=ACCEPT_BATCH,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.HEADER_BYTES,
                timeout_keep_alive=limits.KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._drain_s = drain_s
        self._deadline_s: float | None = None
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if not self.started:
            return
        for api in self._context.apis:
            if api.begin is not None:
                self._context.jobs.start(f"api {api.prefix}", api.begin(self._context))
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work in the background, then close."""
        await self._context.jobs.close()
        await super().shutdown(sockets)
        if self._context.store is not None:
            await self._context.store.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins to drain, the second leaves at once."""
        if self._deadline_s is None:
            self.drain()
        else:
            self.force_exit = self.should_exit = True

    def drain(self) -> None:
        """Begin to stop."""
        self._context.gate.close()
        self._deadline_s = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: leave when the last request has, or when time is up."""
        if self._deadline_s is not None and not self.should_exit:
            self._context.jobs.stop(RESUMABLE)
            if self._context.gate.num_inside == 0:
                self.should_exit = True
            elif time.monotonic() > self._deadline_s:
                await self._context.models.shutdown()
                await asyncio.sleep(0)
                self.should_exit = True
        return await super().on_tick(counter)
