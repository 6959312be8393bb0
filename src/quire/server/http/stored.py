"""What is kept between requests: the values, and what a door asks of a store. `quire.server.store` has one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.requests import Request

from quire.errors import InvalidRequestError
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limit

MOST_LISTED = 100
"""Of one page."""
RETRY_SECONDS = 2.0
"""After which work without a connection asks a store again that could not be used."""

logger = logging.getLogger("quire.server")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """One object of one caller."""

    id: str
    kind: str
    owner: str
    """The caller's name: others' ids are not found."""
    body: dict[str, Any]
    created_s: int = 0
    is_open: bool = False
    """It is still worked on: neither age nor lack of room removes it."""


class Part(NamedTuple):
    """One of the numbered parts of an object, or of a list of them (`ID/NAME`)."""

    number: int | None
    """None: after the last."""
    content: bytes
    name: str = ""
    """By which its owner finds it."""


@dataclass(frozen=True, slots=True)
class Put:
    """Store an object, or its new state."""

    item: Stored
    limit: Limit | None = None
    """Of a new object: how many of its kind its owner may have; of those that are open, where it is."""


@dataclass(frozen=True, slots=True)
class Update:
    """Store the new state of an object. One that is forgotten by now stays so."""

    item: Stored


@dataclass(frozen=True, slots=True)
class AddParts:
    """Store parts of an object under `place`, its id or `ID/NAME`. One whose number is there stays as it is."""

    place: str
    owner: str
    parts: Sequence[Part] = field(default_factory=tuple)
    while_there: str | None = None
    """An object: where it is forgotten by now, so are they."""
    limit: Limit | None = None
    """How many may be there then."""


@dataclass(frozen=True, slots=True)
class Remove:
    """Forget an object with all its parts."""

    id: str


@dataclass(frozen=True, slots=True)
class RemovePart:
    """Forget one part."""

    place: str
    number: int


Change = Put | Update | AddParts | Remove | RemovePart


class Page(NamedTuple):
    """Which of a list are wanted."""

    limit: int
    after: str | None
    descending: bool


class Store(Protocol):
    """Keeps objects. Every method raises `ApiError`: 507 where there is no room, 503 where the store cannot be used."""

    @property
    def num_bytes(self) -> int:
        """That it holds, when it was last written."""

    async def write(self, *changes: Change) -> None:
        """Make all of these changes, or none. Past a `limit` of theirs its error is raised."""

    async def check_room(self, owner: str, num_bytes: int) -> None:
        """Refuse what there is no room for."""

    async def get(self, kind: str, owner: str, name: str) -> Stored | None:
        """An object by its id."""

    async def objects(self, kind: str, owner: str, page: Page, purpose: str | None = None) -> list[Stored]:
        """One more than the page holds, where there are more; with a purpose those whose body names it."""

    async def list_open(self, kind: str) -> list[Stored]:
        """Those of all owners that are worked on."""

    async def count(self, kind: str, owner: str) -> int:
        """How many an owner has."""

    async def parts(self, place: str, *, start: int = 0, limit: int = 2**31 - 1) -> list[Part]:
        """Parts from number `start` on, in their order."""

    async def part_page(self, place: str, page: Page) -> list[Part]:
        """As `objects`, of parts by their names."""

    async def find_part(self, owner: str, name: str, place: str | None = None) -> Part | None:
        """A part by its name, wherever it stands; or where it has to."""

    async def sizes(self, place: str) -> dict[int, int]:
        """Which parts there are, and how many bytes each has."""

    async def close(self) -> None:
        """Write what is to be written, and let go of the file."""


async def when_usable(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives, begun anew until the store can be used: for work without a caller who would ask again."""
    while True:
        try:
            return await work()
        except ApiError as error:
            logger.warning("work in the background waits: %s", error.message)
            await asyncio.sleep(RETRY_SECONDS)


def page_of(request: Request, *, descending: bool, most: int = MOST_LISTED) -> Page:
    """What the query asks for: `limit`, `after`, `order`.

    Raises:
        InvalidRequestError: one of them is wrong.
    """
    query = request.query_params
    limit, order = query.get("limit", "20"), query.get("order", "desc" if descending else "asc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise InvalidRequestError(f"limit must be a whole number from 1 to {most}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("order must be asc or desc", param="order")
    return Page(int(limit), query.get("after"), order == "desc")


def listing(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's shape of a page, from one more item than it holds."""
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > limit}


def not_found(what: str, name: str) -> ApiError:
    """404. So it is for an object of another key."""
    return ApiError(404, f"no {what} {name[:128]!r} is stored here", param="id", code="not_found")


NO_STORE = "this server keeps nothing between requests: it has no store"


def store_of(found: Store | None) -> Store:
    """The store.

    Raises:
        ApiError: 503, there is none.
    """
    if found is None:
        raise ApiError(503, NO_STORE, code="no_store")
    return found
