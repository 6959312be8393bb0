"""Work that goes on without a connection: responses in the background, batches."""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any
from weakref import WeakValueDictionary

from quire.server.http.errors import as_api_error

RESUMABLE = "resumable "
"""Names of jobs that go on after a restart begin so: a server that stops does not wait for them."""

logger = logging.getLogger("quire.server")


class Jobs:
    """Tasks by name, held until they end.

    Args:
        num_slots: pieces of all jobs of one owner, for one model, that are worked on at one time.
    """

    def __init__(self, num_slots: int = 1) -> None:
        self._num_slots = num_slots
        self._slots = WeakValueDictionary[str, asyncio.Semaphore]()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._subjects: dict[str, object] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None], subject: object = None) -> None:
        """Begin. What goes wrong in it is logged."""
        self._subjects[name] = subject
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: str, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(name, None)
        self._subjects.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("work in the background ended: %s", as_api_error(error).message)

    def slots(self, name: str) -> asyncio.Semaphore:
        """For the pieces of an owner's jobs for one model. Others have their own: among those the scheduler is fair."""
        return self._slots.setdefault(name, asyncio.Semaphore(self._num_slots))

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def subject(self, name: str) -> object:
        """What one works on; None once it has ended."""
        return self._subjects.get(name)

    def kinds(self) -> dict[str, int]:
        """How many there are of each kind: the first word of their names."""
        found = Counter(name.removeprefix(RESUMABLE).partition(" ")[0] for name in self._tasks)
        return {"batch": 0, "response": 0, **found}

    async def cancel(self, name: str) -> None:
        """End one, and wait until it has. One that is unknown has ended."""
        task = self._tasks.get(name)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def stop(self, prefix: str) -> None:
        """Begin to end those whose names begin so."""
        for name, task in self._tasks.items():
            if name.startswith(prefix):
                task.cancel()

    async def close(self) -> None:
        """End all."""
        for name in [*self._tasks]:
            await self.cancel(name)
