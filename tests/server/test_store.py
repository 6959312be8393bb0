"""The store: versions, bounds, and what a full, locked or damaged one does to requests. sqlite3 itself is the judge."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from quire.errors import ConfigurationError
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.stored import AddParts, Page, Part, Put, Remove, Stored, Update
from quire.server.store import schema
from quire.server.store.database import DAY_SECONDS, SWEEP_SECONDS, SqliteStore
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine

PAGE = Page(10, None, descending=False)


def thing(name: str, *, kind: str = "response", owner: str = "a", size: int = 10, is_open: bool = False) -> list[Any]:
    return [
        Put(Stored(name, kind, owner, {"id": name}, is_open=is_open)),
        AddParts(name, owner, [Part(0, b"x" * size, f"{name}-part")]),
    ]


@pytest.fixture
def store() -> Iterator[SqliteStore]:
    made = SqliteStore(None, most_bytes=2**20, days=1)
    yield made
    asyncio.run(made.close())


def test_changes_are_made_together_or_not_at_all(store: SqliteStore) -> None:
    async def work() -> None:
        await store.write(*thing("one"), *thing("two", owner="b"))
        assert await store.get("response", "b", "one") is None and await store.get("file", "a", "one") is None
        with pytest.raises(ApiError):
            await store.write(Remove("one"), AddParts("one", "a", [Part(9, {})]))  # type: ignore[arg-type]
        assert await store.get("response", "a", "one") is not None, "the removal was undone"
        await store.write(AddParts("one", "a", [Part(0, b"other"), Part(None, b"next")]))
        assert [(part.number, part.content) for part in await store.parts("one")] == [(0, b"x" * 10), (1, b"next")]
        assert await store.find_part("b", "one-part") is None and await store.find_part("a", "one-part") is not None
        await store.write(AddParts("one/output", "a", [Part(0, b"y")]), Remove("one"))
        assert await store.parts("one") == await store.parts("one/output") == []
        assert [item.id for item in await store.objects("response", "b", PAGE)] == ["two"]

    asyncio.run(work())


def test_nothing_is_kept_for_what_is_forgotten(store: SqliteStore) -> None:
    async def work() -> None:
        await store.write(*thing("one"), Remove("one"))
        parts = [Part(None, b"x", "late"), Part(None, b"y")]
        await store.write(Put(Stored("two", "response", "a", {})), AddParts("one", "a", parts, while_there="one"))
        assert await store.parts("one") == [] and await store.find_part("a", "late") is None
        await store.write(AddParts("two", "a", parts, while_there="two"))
        assert [(part.number, part.content) for part in await store.parts("two")] == [(0, b"x"), (1, b"y")]

    asyncio.run(work())


def test_what_is_bounded_is_counted_where_it_is_written(store: SqliteStore) -> None:
    """By those who ask at one time, too."""
    limits = Limits().with_values({"files": 3, "input_items": 2})

    async def made(number: int, *, is_open: bool) -> bool:
        try:
            await store.write(Put(Stored(f"{is_open}{number}", "file", "a", {}, is_open=is_open), limits.files))
        except ApiError as error:
            assert (error.status, error.code) == (429, "too_many_files")
            return False
        return True

    async def work() -> None:
        assert sum(await asyncio.gather(*(made(number, is_open=True) for number in range(8)))) == 3
        await store.write(Remove("True0"))
        assert await made(9, is_open=True) and not await made(10, is_open=True)
        assert not await made(11, is_open=False), "open ones are there, too"
        await store.write(AddParts("True9", "a", [Part(None, b"x")] * 2, limit=limits.input_items))
        with pytest.raises(ApiError):
            await store.write(AddParts("True9", "a", [Part(None, b"x")], limit=limits.input_items))
        assert len(await store.parts("True9")) == 2

    asyncio.run(work())


def test_what_was_forgotten_meanwhile_does_not_come_back(store: SqliteStore) -> None:
    async def work() -> None:
        item = Stored("one", "conversation", "a", {"metadata": {}})
        changed = Update(replace(item, body={"metadata": {"x": "y"}}))
        await store.write(changed)
        assert await store.get("conversation", "a", "one") is None
        await store.write(Put(item), changed)
        found = await store.get("conversation", "a", "one")
        assert found is not None and found.body == {"metadata": {"x": "y"}}

    asyncio.run(work())


def test_a_file_that_was_moved_away_is_missed_until_it_is_back(tmp_path: Path) -> None:
    async def work() -> None:
        store = opened(tmp_path)
        await store.write(*thing("one"))
        for name in os.listdir(tmp_path):
            if name != "store.lock":
                os.rename(tmp_path / name, tmp_path / f"{name}.old")
        for _ in range(2):
            with pytest.raises(ApiError, match="moved away or replaced") as caught:
                await store.write(*thing("two"))
            assert (caught.value.status, caught.value.code) == (503, "store_unreadable")
        assert not (tmp_path / "store.sqlite").exists()
        for name in os.listdir(tmp_path):
            if name.endswith(".old"):
                os.rename(tmp_path / name, tmp_path / name.removesuffix(".old"))
        assert await store.get("response", "a", "two") is None
        await store.write(*thing("three"))
        await store.close()
        again = opened(tmp_path)
        assert await again.get("response", "a", "one") is not None
        assert await again.get("response", "a", "three") is not None
        await again.close()

    asyncio.run(work())
    assert (tmp_path / "store.sqlite").stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_the_oldest_responses_of_who_holds_most_make_room(store: SqliteStore) -> None:
    async def work() -> None:
        await store.write(*thing("small", owner="b"))
        for number in range(300):
            await store.check_room("a", 2**12)
            await store.write(*thing(f"r{number}", size=2**13))
        kept = [item.id for item in await store.objects("response", "a", Page(1000, None, descending=False))]
        assert (
            20 < len(kept) < 130
            and kept[-1] == "r299"
            and "r0" not in kept
            and kept == sorted(kept, key=lambda name: int(name[1:]))
        )
        assert await store.get("response", "b", "small") is not None

    asyncio.run(work())


def test_files_are_not_taken_away_and_no_owner_fills_it(store: SqliteStore) -> None:
    async def work() -> None:
        await store.write(*thing("f1", kind="file", size=2**19))
        with pytest.raises(ApiError, match="for more of this key") as caught:
            await store.check_room("a", 2**18 + 2**17)
        assert caught.value.status == 507
        await store.check_room("b", 2**18)
        with pytest.raises(ApiError, match="no room") as caught:
            await store.write(*thing("f2", kind="file", owner="b", size=2**19))
        assert (caught.value.status, caught.value.code) == (507, "store_full")
        await store.write(*thing("f3", kind="file", owner="b"))

    asyncio.run(work())


def test_what_is_old_goes_unless_it_is_worked_on() -> None:
    now_s = 10.0 * DAY_SECONDS

    async def work() -> None:
        nonlocal now_s
        store = SqliteStore(None, most_bytes=2**20, days=2, clock=lambda: now_s)
        await store.write(*thing("old"), *thing("open", kind="batch", is_open=True), *thing("input", kind="file"))
        await store.write(Put(Stored("reads", "batch", "a", {"input_file_id": "input"}, is_open=True)))
        now_s += 3 * DAY_SECONDS
        await store.write(*thing("new"))
        now_s += SWEEP_SECONDS + 1
        assert await store.get("response", "a", "old") is None and await store.parts("old") == []
        assert await store.get("response", "a", "new") is not None
        assert [item.id for item in await store.list_open("batch")] == ["open", "reads"]
        assert await store.get("file", "a", "input") is not None, "a batch still reads it"
        await store.close()

    asyncio.run(work())


def opened(directory: Path) -> SqliteStore:
    return SqliteStore(directory, most_bytes=2**22, days=1)


def test_the_schema_has_a_version_and_moves_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    asyncio.run(store.write(*thing("one")))
    with pytest.raises(ConfigurationError, match="another server") as caught:
        opened(tmp_path)
    assert caught.value.field == "state_dir"
    asyncio.run(store.close())
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE more (x);"))
    newer = opened(tmp_path)
    assert asyncio.run(newer.get("response", "a", "one")) is not None
    asyncio.run(newer.close())
    found = sqlite3.connect(tmp_path / "store.sqlite")
    assert found.execute("PRAGMA user_version").fetchone() == (2,)
    assert found.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert found.execute("SELECT count(*) FROM more").fetchone() == (0,)
    found.close()
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="version 2, and this is"):
        opened(tmp_path)
    assert (tmp_path / "store.sqlite").stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_a_directory_that_cannot_be_had_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError) as caught:
        opened(tmp_path / "file")
    assert caught.value.field == "state_dir"


def lock(directory: Path) -> Callable[[], object]:
    holder = sqlite3.connect(directory / "store.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    return holder.close


def damage(directory: Path) -> Callable[[], object]:
    path = directory / "store.sqlite"
    good = path.read_bytes()
    path.write_bytes(good[:100] + os.urandom(len(good) - 100))

    def mend() -> None:
        path.write_bytes(good)

    return mend


@pytest.mark.parametrize(("break_it", "code"), [(lock, "store_locked"), (damage, "store_damaged")])
def test_one_that_cannot_be_used_is_said_and_all_else_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Path], Callable[[], object]], code: str
) -> None:
    monkeypatch.setattr("quire.server.store.database.BUSY_SECONDS", 0.05)
    seed = opened(tmp_path)
    asyncio.run(seed.write(*thing("one", owner="")))
    asyncio.run(seed.close())
    mend = break_it(tmp_path) if break_it is damage else None
    instance: Running = start(FakeEngine(), store=opened(tmp_path))
    client = instance.client()
    try:
        mend = mend or break_it(tmp_path)
        with pytest.raises(openai.APIStatusError, match="the store is") as caught:
            client.files.create(file=b"x", purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (503, code)
        assert caught.value.response.headers["retry-after"] == "1" and str(tmp_path) not in caught.value.message
        if break_it is damage:
            with pytest.raises(openai.APIStatusError, match="the store is"):
                client.responses.create(input="x")
        assert client.responses.create(input="x", store=False, max_output_tokens=2).output_text == "ab"
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text == "ab"
        mend()
        assert client.files.create(file=b"x", purpose="batch").bytes == 1
    finally:
        instance.stop()


def test_a_full_one_is_said_and_a_response_is_still_given() -> None:
    instance = start(FakeEngine(), store=SqliteStore(None, most_bytes=2**20, days=1))
    client = instance.client()
    try:
        with pytest.raises(openai.APIStatusError, match="no room") as caught:
            client.files.create(file=b"x" * 2**20, purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (507, "store_full")
        client.files.create(file=b"x" * 400_000, purpose="batch")
        made = client.responses.create(input="x" * 300, metadata={"a": "b"})
        assert client.responses.retrieve(made.id) == made
    finally:
        instance.stop()
