"""The store: SQLite, in a thread of its own beside the event loop.

One file `store.sqlite` with a write-ahead log in the directory of `--state-dir`, or memory without one. What is older
than its age goes; where there is no room, the oldest responses of the owner that holds most make some; after that,
writing is refused with 507. What cannot be used (locked by another program, damaged) is 503 with the reason, and is
tried anew by the next request.
"""

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from quire.errors import ConfigurationError
from quire.server.http.errors import ApiError
from quire.server.http.limits import RETRY_AFTER_SECONDS
from quire.server.http.stored import AddParts, Change, Page, Part, Put, Remove, RemovePart, Stored, Update
from quire.server.store.schema import prepare

PAGE_BYTES = 4096
BUSY_SECONDS = 2
"""For which another program may hold the file."""
EVICTED = 16
"""Responses that make room at one time."""
MOST_EVICTIONS = 32
"""For one write."""
MARGIN_BYTES = 16 * PAGE_BYTES
SWEEP_SECONDS = 600
DAY_SECONDS = 86400
_COLUMNS = "id, kind, owner, body, created_s, is_open"
_RESPONSES = "kind = 'response' AND NOT is_open"

logger = logging.getLogger("quire.server")

T = TypeVar("T")


class _MovedError(sqlite3.OperationalError):
    """The file is not the one that is open."""


class SqliteStore:
    """See `quire.server.http.stored.Store`.

    Args:
        directory: where the file is; None: memory.
        most_bytes: of the file.
        days: after which objects are forgotten.
        clock: seconds since 1970.

    Raises:
        ConfigurationError: no directory can be had there, or another server has it.
    """

    def __init__(
        self, directory: Path | None, *, most_bytes: int, days: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._most_pages, self._age_s, self._clock = max(64, most_bytes // PAGE_BYTES), days * DAY_SECONDS, clock
        self._lock_file = -1 if directory is None else _take(directory)
        self._path = ":memory:" if directory is None else str(directory / "store.sqlite")
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        """Which file that is open."""
        self._swept_s, self._num_bytes = 0.0, 0
        self._thread = ThreadPoolExecutor(1, "quire-store")
        try:
            with suppress(ApiError):  # one that is damaged is said where it is asked for
                self._thread.submit(self._work, lambda connection: None).result()
        except BaseException:
            self._let_go()
            raise

    # What doors call.

    @property
    def num_bytes(self) -> int:
        """That it holds, when it was last written."""
        return self._num_bytes

    async def write(self, *changes: Change) -> None:
        """Make all of these changes, or none."""
        await self._run(lambda connection: self._write(connection, changes))

    async def check_room(self, owner: str, num_bytes: int) -> None:
        """Refuse what there is no room for: an owner may hold as much as is left free."""
        await self._run(lambda connection: self._check_room(connection, owner, num_bytes))

    async def get(self, kind: str, owner: str, name: str) -> Stored | None:
        """An object by its id."""
        query = f"SELECT {_COLUMNS} FROM objects WHERE id = ? AND kind = ? AND owner = ?"
        return next(iter(await self._found_objects(query, name, kind, owner)), None)

    async def objects(self, kind: str, owner: str, page: Page, purpose: str | None = None) -> list[Stored]:
        """One more than the page holds, where there are more; with a purpose those whose body names it."""
        after, order = _direction(page)
        query = f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND owner = ?"
        values: list[object] = [kind, owner]
        if page.after is not None:
            query += f" AND number {after} (SELECT number FROM objects WHERE id = ? AND kind = ? AND owner = ?)"
            values += [page.after, kind, owner]
        if purpose is not None:
            query += " AND json_extract(CAST(body AS TEXT), '$.purpose') = ?"
            values.append(purpose)
        return await self._found_objects(f"{query} ORDER BY number {order} LIMIT {page.limit + 1}", *values)

    async def list_open(self, kind: str) -> list[Stored]:
        """Those of all owners that are worked on."""
        query = f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND is_open ORDER BY number"
        return await self._found_objects(query, kind)

    async def count(self, kind: str, owner: str) -> int:
        """How many an owner has."""
        return await self._run(lambda connection: _count(connection, kind, owner))

    async def parts(self, place: str, *, start: int = 0, limit: int = 2**31 - 1) -> list[Part]:
        """Parts from number `start` on, in their order."""
        query = "SELECT number, content, name FROM parts WHERE place = ? AND number >= ? ORDER BY number LIMIT ?"
        return await self._found_parts(query, place, start, limit)

    async def part_page(self, place: str, page: Page) -> list[Part]:
        """As `objects`, of parts by their names."""
        after, order = _direction(page)
        query, values = "SELECT number, content, name FROM parts WHERE place = ?", [place]
        if page.after is not None:
            query += f" AND number {after} (SELECT number FROM parts WHERE place = ? AND name = ?)"
            values += [place, page.after]
        return await self._found_parts(f"{query} ORDER BY number {order} LIMIT {page.limit + 1}", *values)

    async def find_part(self, owner: str, name: str, place: str | None = None) -> Part | None:
        """A part by its name, wherever it stands; or where it has to."""
        query = "SELECT number, content, name FROM parts WHERE owner = ?1 AND name = ?2 AND name != ''"
        query += " AND place = coalesce(?3, place) LIMIT 1"
        return next(iter(await self._found_parts(query, owner, name, place)), None)

    async def sizes(self, place: str) -> dict[int, int]:
        """Which parts there are, and how many bytes each has."""
        query = "SELECT number, length(content) FROM parts WHERE place = ?"
        return dict(await self._run(lambda connection: connection.execute(query, (place,)).fetchall()))

    async def close(self) -> None:
        """Write what is to be written, and let go of the file."""
        await asyncio.get_running_loop().run_in_executor(None, self._let_go)

    # In the thread.

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    async def _found_objects(self, query: str, *values: object) -> list[Stored]:
        rows = await self._run(lambda connection: connection.execute(query, values).fetchall())
        return [
            Stored(name, kind, owner, msgspec.json.decode(body), created_s, bool(is_open))
            for name, kind, owner, body, created_s, is_open in rows
        ]

    async def _found_parts(self, query: str, *values: object) -> list[Part]:
        return [Part(*row) for row in await self._run(lambda connection: connection.execute(query, values).fetchall())]

    def _work(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._opened()
            now_s = self._clock()
            if now_s - self._swept_s > SWEEP_SECONDS:
                self._swept_s = now_s
                self._sweep(connection, now_s)
            return work(connection)
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and self._found_file() != self._file:
            # What is written now would be in a file that no later start reads; and another server may have the new one.
            raise _MovedError("the file was moved away or replaced")
        if self._connection is None:
            if self._path != ":memory:":
                with suppress(OSError):  # SQLite says what is wrong
                    os.close(os.open(self._path, os.O_CREAT | os.O_CLOEXEC, 0o600))  # others may not read it
            connection = sqlite3.connect(self._path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA max_page_count = {self._most_pages}")
                prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._file = connection, self._found_file()
            self._num_bytes = self._held_bytes(connection)
        return self._connection

    def _found_file(self) -> tuple[int, int] | None:
        if self._path == ":memory:":
            return None
        with suppress(OSError):
            found = os.stat(self._path)
            return found.st_dev, found.st_ino
        return None

    def _check_room(self, connection: sqlite3.Connection, owner: str, num_bytes: int) -> None:
        query = "SELECT coalesce(sum(num_bytes), 0) FROM held WHERE owner = ?"
        self._refuse_large(num_bytes)
        while True:
            free = self._free_bytes(connection) - MARGIN_BYTES
            (held,) = connection.execute(query, (owner,)).fetchone()
            if num_bytes > free:
                if not self._evict(connection):
                    raise _full()
            elif held + num_bytes <= free:
                return
            elif not self._evict(connection, owner):
                raise _full(" for more of this key")

    def _refuse_large(self, num_bytes: int) -> None:
        """Before anything makes room for it."""
        if num_bytes > self._most_pages * PAGE_BYTES // 2:
            raise _full(f" for {num_bytes:,} bytes at one time")

    def _write(self, connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
        self._refuse_large(
            sum(len(part.content) for item in changes if isinstance(item, AddParts) for part in item.parts)
        )
        for _ in range(MOST_EVICTIONS):
            connection.execute("BEGIN IMMEDIATE")
            try:
                for change in changes:
                    self._apply(connection, change)
                connection.execute("COMMIT")
                self._num_bytes = self._held_bytes(connection)
                return
            except BaseException as error:
                with suppress(sqlite3.Error):  # SQLite may have done so itself
                    connection.execute("ROLLBACK")
                if not _is_full(error) or not self._evict(connection):
                    raise
        raise _full()

    def _apply(self, connection: sqlite3.Connection, change: Change) -> None:
        match change:
            case Update(item):
                query = "UPDATE objects SET body = ?, is_open = ? WHERE id = ?"
                connection.execute(query, (msgspec.json.encode(item.body), item.is_open, item.id))
            case Put(item, limit):
                if limit is not None and _count(connection, item.kind, item.owner, item.is_open) >= limit.value:
                    raise limit.error()
                query = f"INSERT INTO objects ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                values = (item.id, item.kind, item.owner, msgspec.json.encode(item.body))
                created_s = item.created_s or int(self._clock())
                query += "kind = excluded.kind, body = excluded.body, is_open = excluded.is_open"
                connection.execute(query, (*values, created_s, item.is_open))
            case AddParts(place, owner, parts, whose, limit):
                query = (
                    "INSERT OR IGNORE INTO parts (place, number, owner, name, content) SELECT ?1, coalesce(?2, "
                    "(SELECT coalesce(max(number), -1) + 1 FROM parts WHERE place = ?1)), ?3, ?4, ?5 "
                    "WHERE ?6 IS NULL OR EXISTS (SELECT 1 FROM objects WHERE id = ?6)"
                )
                rows = ((place, part.number, owner, part.name, part.content, whose) for part in parts)
                connection.executemany(query, rows)
                count = "SELECT count(*) FROM parts WHERE place = ?"
                if limit is not None and connection.execute(count, (place,)).fetchone()[0] > limit.value:
                    raise limit.error(place="items")
            case Remove(name):
                connection.execute("DELETE FROM objects WHERE id = ?", (name,))
            case RemovePart(place, number):
                connection.execute("DELETE FROM parts WHERE place = ? AND number = ?", (place, number))

    def _evict(self, connection: sqlite3.Connection, owner: str | None = None) -> bool:
        """Make room; False where there are no responses (of this owner) to forget."""
        if owner is None:
            query = (
                f"SELECT owner FROM objects WHERE {_RESPONSES} GROUP BY owner ORDER BY "
                "(SELECT num_bytes FROM held WHERE held.owner = objects.owner) DESC LIMIT 1"
            )
            found = connection.execute(query).fetchone()
            if found is None:
                return False
            owner = found[0]
        query = f"SELECT number FROM objects WHERE {_RESPONSES} AND owner = ? ORDER BY number LIMIT {EVICTED}"
        return connection.execute(f"DELETE FROM objects WHERE number IN ({query})", (owner,)).rowcount > 0

    def _sweep(self, connection: sqlite3.Connection, now_s: float) -> None:
        """Forget what is too old, but for files that an open batch still reads."""
        read = "coalesce(json_extract(CAST(body AS TEXT), '$.input_file_id'), '')"
        read = f"SELECT {read} FROM objects WHERE kind = 'batch' AND is_open"
        query = f"DELETE FROM objects WHERE NOT is_open AND created_s < ? AND id NOT IN ({read})"
        connection.execute(query, (int(now_s - self._age_s),))

    def _free_bytes(self, connection: sqlite3.Connection) -> int:
        pages, free = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        return int((self._most_pages - pages + free) * PAGE_BYTES)

    def _held_bytes(self, connection: sqlite3.Connection) -> int:
        return self._most_pages * PAGE_BYTES - self._free_bytes(connection)

    def _refusal(self, error: sqlite3.Error) -> ApiError:
        logger.error("the store: %s", ascii(str(error))[:200])
        if _is_full(error):
            return _full()
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        if "locked" in str(error) or "busy" in str(error):
            text = "the store is locked by another program; what is not stored is served (store: false)"
            return ApiError(503, text, code="store_locked", headers=headers)
        if isinstance(error, _MovedError):
            text = "the store's file was moved away or replaced: put it back, or start the server anew; what is not "
            return ApiError(503, f"{text}stored is served (store: false)", code="store_unreadable", headers=headers)
        if self._connection is not None and self._path != ":memory:":  # the next request opens it anew
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        reason = "damaged" if isinstance(error, sqlite3.DatabaseError) and not _is_io(error) else "not readable"
        text = f"the store is {reason}; what is not stored is served (store: false)"
        return ApiError(503, text, code="store_damaged" if reason == "damaged" else "store_unreadable", headers=headers)

    def _let_go(self) -> None:
        if self._connection is not None:
            self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1


def _take(directory: Path) -> int:
    """Make the directory ours alone: its descriptor's lock ends with this process."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "store.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = (error.strerror or "not usable").lower()
        raise ConfigurationError(f"state_dir cannot be used: {reason}", field="state_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigurationError("state_dir is used by another server", field="state_dir") from error
    return lock


def _count(connection: sqlite3.Connection, kind: str, owner: str, open_only: bool = False) -> int:
    query = "SELECT count(*) FROM objects WHERE kind = ? AND owner = ?" + " AND is_open" * open_only
    return int(connection.execute(query, (kind, owner)).fetchone()[0])


def _direction(page: Page) -> tuple[str, str]:
    return ("<", "DESC") if page.descending else (">", "ASC")


def _is_full(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "is full" in str(error)


def _is_io(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError)


def _full(whose: str = "") -> ApiError:
    text = f"the store has no room{whose} (--store-bytes): delete files, batches or conversations, or send store: false"
    return ApiError(507, text, code="store_full")
