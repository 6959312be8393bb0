"""OpenAI's client, unchanged, against /v1/files and /v1/batches; a restart in the middle."""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch, FileObject
from prometheus_client.parser import text_string_to_metric_families

from quire.server.doors.openai.batches.runner import _split
from quire.server.http.errors import ApiError
from quire.server.http.jobs import Jobs
from quire.server.http.limits import Limits
from quire.server.http.stored import Put
from quire.server.store.database import SqliteStore
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
NUM_LINES = 300


def line(name: str, url: str = TEXT, **body: Any) -> str:
    base: dict[str, Any] = {TEXT: {"prompt": name}, RESPONSES: {"input": name}}.get(
        url, {"messages": [{"role": "user", "content": name}]}
    )
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {**base, **body}})


def submit(client: openai.OpenAI, lines: list[str], endpoint: Any = TEXT) -> Batch:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def ended(client: openai.OpenAI, name: str) -> Batch:
    over = ("completed", "failed", "expired", "cancelled")
    assert wait_until(lambda: client.batches.retrieve(name).status in over)
    found = client.batches.retrieve(name)
    return Batch.model_validate(found.to_dict(), strict=True)


def results(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    assert name is not None
    return [json.loads(text) for text in client.files.content(name).text.splitlines()]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    limits = Limits().with_values({"file_bytes": 2**20, "batch_lines": 400, "files": 30, "batches": 2})
    instance = start(FakeEngine(), store=memory(), api_key=["a", "b", "c"], limits=limits)
    yield instance
    instance.stop()


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return keyed(running, "a")


def keyed(running: Running, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


@pytest.mark.parametrize("endpoint", [CHAT, TEXT, RESPONSES])
@pytest.mark.client("openai", "batches.create", "batches.retrieve", "batches.list", "files.content")
def test_a_batch(client: openai.OpenAI, running: Running, endpoint: str) -> None:
    lengths = {"max_output_tokens" if endpoint == RESPONSES else "max_tokens": 3}
    batch = submit(client, [line(f"l{number}", endpoint, seed=number, **lengths) for number in range(5)], endpoint)
    assert Batch.model_validate(batch.to_dict(), strict=True).status == "validating"
    batch = ended(client, batch.id)
    assert (batch.status, batch.error_file_id) == ("completed", None) and batch.completed_at is not None
    assert batch.request_counts is not None and batch.request_counts.to_dict() == {
        "completed": 5,
        "failed": 0,
        "total": 5,
    }
    found = results(client, batch.output_file_id)
    assert [item["custom_id"] for item in found] == [f"l{number}" for number in range(5)]
    body = found[2]["response"]["body"]
    assert found[2]["response"]["status_code"] == 200 and found[2]["error"] is None
    said = {
        CHAT: lambda: body["choices"][0]["message"]["content"],
        TEXT: lambda: body["choices"][0]["text"],
        RESPONSES: lambda: body["output"][0]["content"][0]["text"],
    }
    assert said[endpoint]() == "cde"
    asked = [call for call in running.engine.calls if "params" in call][-1]
    assert asked["is_background"] is True and asked["caller"].name.endswith("/batch")
    assert client.batches.list(limit=1).data[0].id == batch.id


def test_a_bad_line_fails_alone(client: openai.OpenAI) -> None:
    lines = [
        line("good"),
        "{not json",
        '{"custom_id": "half"}',
        line("good"),
        line("elsewhere", CHAT),
        line("streamed", stream=True),
        line("refused", max_tokens=-5),
        line("unknown", temprature=1),
        line("fail"),
        "",
        "[1]",
        line("last"),
    ]
    batch = ended(client, submit(client, lines).id)
    assert batch.status == "completed" and batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (11, 2, 9)
    errors = results(client, batch.error_file_id)
    assert [item["custom_id"] for item in results(client, batch.output_file_id)] == ["good", "last"]
    codes = [item["error"]["code"] if item["error"] else item["response"]["status_code"] for item in errors]
    assert codes == ["malformed_json", "invalid_value", "duplicate_custom_id", "mismatched_url", "invalid_value",
                     400, 400, 500, "malformed_json"]  # fmt: skip
    assert [item["custom_id"] for item in errors[:3]] == [None, "half", "good"]
    assert errors[5]["response"]["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(("lines", "code"), [([], "empty_file"), (["x"] * 401, "too_many_lines")])
def test_a_file_that_is_no_batch_fails_it(client: openai.OpenAI, lines: list[str], code: str) -> None:
    batch = ended(client, submit(client, lines).id)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    assert batch.errors.data[0].code == code


@pytest.mark.client("openai", "batches.cancel")
def test_cancel(client: openai.OpenAI, running: Running) -> None:
    batch = submit(client, [line("quick"), *(line(f"held {number}") for number in range(3))])
    assert wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.files.delete(batch.input_file_id)
    cancelled = client.batches.cancel(batch.id)
    assert Batch.model_validate(cancelled.to_dict(), strict=True).status == "cancelled"
    assert wait_until(lambda: running.engine.num_running == 0)
    assert [item["custom_id"] for item in results(client, cancelled.output_file_id)] == ["quick"]
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_one_that_the_store_lets_not_end_can_be_cancelled(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = running.server._context.store
    write, refused = store.write, []

    async def refusing(*changes: Any) -> None:
        if any(isinstance(one, Put) and one.item.body.get("status") == "completed" for one in changes):
            refused.append(changes)
            raise ApiError(507, "full")
        await write(*changes)

    monkeypatch.setattr(store, "write", refusing)
    batch = submit(client, [line("one")])
    assert wait_until(lambda: bool(refused))
    assert client.batches.retrieve(batch.id).status == "in_progress", "it has not ended"
    assert client.batches.cancel(batch.id).status == "cancelled"
    found = client.batches.retrieve(batch.id)
    assert found.status == "cancelled"
    assert [item["custom_id"] for item in results(client, found.output_file_id)] == ["one"]


def test_a_batch_waits_for_a_store_that_gives_nothing(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = running.server._context.store
    parts, asked = store.parts, []

    async def refusing(*values: Any, **more: Any) -> Any:
        asked.append(values)
        if len(asked) < 2:
            raise ApiError(503, "locked")
        return await parts(*values, **more)

    monkeypatch.setattr("quire.server.doors.openai.batches.runner.RETRY_SECONDS", 0.01)
    monkeypatch.setattr(store, "parts", refusing)
    assert ended(client, submit(client, [line("one")]).id).status == "completed"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_the_same_in_pieces_of_any_size(size: int) -> None:
    text = b"\none\n\n  \ntwo three\n\nfour"
    rest, number, found = bytearray(), 0, []
    for at in range(0, len(text), size):
        lines, rest, count = _split(rest, text[at : at + size])
        found += [(number + place, one) for place, one in lines]
        number += count
    assert (found, bytes(rest), number) == ([(1, b"one"), (4, b"two three")], b"four", 6)


@pytest.mark.client("openai", "files.create", "files.retrieve", "files.list(purpose, limit)", "files.content")
def test_files(client: openai.OpenAI) -> None:
    content = b"a\r\n--b\r\n" * 70_000
    made = client.files.create(file=("x y.jsonl", content), purpose="batch")
    assert FileObject.model_validate(made.to_dict(), strict=True).bytes == len(content)
    assert made.filename == "x y.jsonl" and client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert client.files.list(purpose="batch", limit=1).data[0].id == made.id
    assert all(item.purpose == "batch_output" for item in client.files.list(purpose="batch_output"))
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_bounds_and_keys(running: Running, client: openai.OpenAI) -> None:
    other = keyed(running, "b")
    with pytest.raises(openai.APIStatusError, match="1,048,576 bytes") as caught:
        other.files.create(file=b"x" * (2**20 + 1), purpose="batch")
    assert caught.value.status_code == 413
    held = [submit(other, [line(f"held {number}")]) for number in range(2)]
    with pytest.raises(openai.RateLimitError, match="limited to 2 batches"):
        submit(other, [line("x")])
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(held[0].id)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(held[0].input_file_id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=held[0].input_file_id, endpoint=TEXT, completion_window="24h")
    assert held[0].id not in {batch.id for batch in client.batches.list()}
    for batch in held:
        other.batches.cancel(batch.id)
    third = keyed(running, "c")
    for _ in range(30):
        third.files.create(file=b"x", purpose="batch")
    with pytest.raises(openai.RateLimitError, match="30 files"):
        third.files.create(file=b"x", purpose="batch")


def test_bad_forms_and_bodies(running: Running) -> None:
    with httpx.Client(base_url=running.url, headers={"authorization": "Bearer a"}) as http:
        form = {"content-type": "multipart/form-data; boundary=b"}
        for content in (b"", b"--b", b"--b\r\n\r\n--b--", b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--"):
            response = http.post("/v1/files", content=content, headers=form)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_form")
        assert http.post("/v1/files", json={}).status_code == 415
        for data, param in (
            ({}, "purpose"),
            ({"purpose": "vision"}, "purpose"),
            ({"purpose": "batch", "expires_after[seconds]": "5"}, "expires_after[seconds]"),
            ({"purpose": "batch", "porpose": "x"}, "porpose"),
        ):
            response = http.post("/v1/files", data=data, files={"file": b"x"})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        good = {"input_file_id": "file-1", "endpoint": TEXT, "completion_window": "24h"}
        for changes, param in (
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
        ):
            response = http.post("/v1/batches", json={**good, **changes})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)


class Stops(FakeEngine):
    """Counts what it answers by prompt, and holds everything from a certain request on."""

    def __init__(self, answered: "Counter[str]", held_from: int) -> None:
        super().__init__()
        self.answered, self._held_from = answered, held_from

    async def generate(self, prompt: Any, sampling_params: Any, **options: Any) -> Any:
        name = bytes(prompt["prompt_token_ids"]).decode()
        if sum(self.answered.values()) >= self._held_from:
            prompt = {"prompt_token_ids": b"held"}
        async for output in super().generate(prompt, sampling_params, **options):
            self.answered[name] += output.finished
            yield output


def test_a_restart_in_the_middle_loses_and_doubles_nothing(tmp_path: Path) -> None:
    answered: Counter[str] = Counter()
    names = [f"line {number}" for number in range(NUM_LINES)]
    lines = [line(name, seed=number % 26, max_tokens=3) for number, name in enumerate(names)]
    lines[7] = "broken"
    first = start(Stops(answered, 120), store=open_store(tmp_path))
    batch = submit(first.client(), lines)
    assert wait_until(lambda: sum(answered.values()) >= 120)
    running = first.client().batches.retrieve(batch.id)
    assert running.status == "in_progress" and running.output_file_id is None
    first.stop()
    stored = sqlite3.connect(tmp_path / "store.sqlite").execute(
        "SELECT count(*) FROM parts WHERE place LIKE '%-output'"
    )
    assert stored.fetchone()[0] >= 120
    second = start(Stops(answered, 10**6), store=open_store(tmp_path))
    try:
        client = second.client()
        done = ended(client, batch.id)
        assert done.status == "completed" and done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (NUM_LINES - 1, 1)
        found = results(client, done.output_file_id)
        assert [item["custom_id"] for item in found] == names[:7] + names[8:], "nothing lost, nothing doubled"
        letters = "abcdefghijklmnopqrstuvwxyzabc"
        for item in found:
            seed = int(item["custom_id"].split()[1]) % 26
            assert item["response"]["body"]["choices"][0]["text"] == letters[seed : seed + 3]
        assert len(results(client, done.error_file_id)) == 1
        assert set(answered) == {*names[:7], *names[8:]} and set(answered.values()) == {1}, "none was asked again"
        shown = {
            (item.name, item.labels.get("status", item.labels.get("kind"))): item.value
            for family in text_string_to_metric_families(httpx.get(f"{second.url}/metrics").text)
            for item in family.samples
        }
        assert shown["quire:batch_lines_total", "failed"] == 0, "that was before this start"
        assert 0 < shown["quire:batch_lines_total", "completed"] <= NUM_LINES - 120
        assert shown["quire:background_jobs", "batch"] == 0
        held = (tmp_path / "store.sqlite").stat().st_size + (tmp_path / "store.sqlite-wal").stat().st_size
        assert 2**15 < shown["quire:store_bytes", None] <= held
    finally:
        second.stop()


def open_store(directory: Path) -> SqliteStore:
    return SqliteStore(directory, most_bytes=2**26, days=1)


def test_what_was_worked_on_in_the_background_failed_with_the_server(tmp_path: Path) -> None:
    first = start(FakeEngine(), store=open_store(tmp_path), drain_s=0.1)
    made = first.client().responses.create(input="held", background=True)
    first.stop()
    second = start(FakeEngine(), store=open_store(tmp_path))
    try:
        assert wait_until(lambda: second.client().responses.retrieve(made.id).status == "failed")
    finally:
        second.stop()


def test_what_was_open_is_gone_on_with_when_a_locked_store_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.server.store.database.BUSY_SECONDS", 0.05)
    monkeypatch.setattr("quire.server.http.stored.RETRY_SECONDS", 0.05)
    first = start(Stops(Counter(), 0), store=open_store(tmp_path), drain_s=0.1)
    response = first.client().responses.create(input="held", background=True)
    batch = submit(first.client(), [line("a"), line("b")])
    assert wait_until(lambda: first.client().batches.retrieve(batch.id).status == "in_progress")
    first.stop()
    holder = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    second = start(Stops(Counter(), 10**6), store=open_store(tmp_path))
    try:
        client = second.client()
        with pytest.raises(openai.APIStatusError, match="locked"):
            client.batches.retrieve(batch.id)
        holder.close()
        assert ended(client, batch.id).status == "completed"
        assert wait_until(lambda: client.responses.retrieve(response.id).status == "failed")
    finally:
        second.stop()


def test_a_batch_whose_lines_cannot_be_read_for_a_while_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.http.stored.RETRY_SECONDS", 0.05)
    store, broken = memory(), [True] * 3

    async def read(*arguments: Any, **options: Any) -> Any:
        if broken:
            broken.pop()
            raise ApiError(503, "the store is not readable", code="store_unreadable")
        return await SqliteStore.parts(store, *arguments, **options)

    monkeypatch.setattr(store, "parts", read)
    instance = start(FakeEngine(), store=store)
    try:
        batch = ended(instance.client(), submit(instance.client(), [line("a"), line("b")]).id)
        assert (batch.status, batch.error_file_id, broken) == ("completed", None, [])
    finally:
        instance.stop()


def test_a_response_in_the_background_that_cannot_be_kept_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.http.stored.RETRY_SECONDS", 0.05)
    store = memory()
    written: list[int] = []

    async def write(*changes: Any) -> None:
        written.append(len(changes))
        if 1 < len(written) < 5:
            raise ApiError(507, "the store has no room", code="store_full")
        await SqliteStore.write(store, *changes)

    monkeypatch.setattr(store, "write", write)
    instance = start(FakeEngine(), store=store)
    try:
        client = instance.client()
        made = client.responses.create(input="x", background=True, max_output_tokens=2)
        assert wait_until(lambda: client.responses.retrieve(made.id).status == "failed")
        error = client.responses.retrieve(made.id).error
        assert error is not None and error.message == "the response could not be stored"
    finally:
        instance.stop()


def test_a_key_with_many_batches_has_no_more_lines_at_one_time_than_another() -> None:
    async def work() -> None:
        jobs = Jobs(2)
        first, other = jobs.slots("a"), jobs.slots("b")
        await first.acquire()
        await jobs.slots("a").acquire()
        assert jobs.slots("a").locked(), "all batches of a key share its slots"
        await asyncio.wait_for(other.acquire(), PATIENCE_S)

    asyncio.run(work())
