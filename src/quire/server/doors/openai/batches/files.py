"""/v1/files: what batches read and write."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quire.errors import InvalidRequestError, unknown_name_message
from quire.server.doors.openai.batches.multipart import boundary_of, parse_form
from quire.server.http.context import ServerContext
from quire.server.http.keys import caller_of
from quire.server.http.stored import AddParts, Part, Put, Remove, Store, Stored, listing, not_found, page_of, store_of

KIND = "file"
BATCH, BATCH_OUTPUT = "batch", "batch_output"
PIECE_BYTES = 2**18
MOST_LISTED = 10_000
PARTS_READ = 16
"""At one time."""


def file_object(owner: str, name: str, filename: str, purpose: str, num_bytes: int) -> Stored:
    """A file as it is kept and shown."""
    created_s = int(time.time())
    body: dict[str, Any] = {"id": name, "object": "file", "bytes": num_bytes, "created_at": created_s}
    body |= {"filename": filename, "purpose": purpose, "status": "processed"}
    return Stored(name, KIND, owner, body, created_s)


def new_file_id() -> str:
    """One that cannot be guessed."""
    return f"file-{secrets.token_hex(16)}"


async def create_file(request: Request) -> Response:
    """Keep a file for a batch."""
    context: ServerContext = request.app.state.context
    owner, store, limits = caller_of(request.scope), store_of(context.store), context.limits
    boundary = boundary_of(request.headers.get("content-type", ""))
    if await store.count(KIND, owner) >= limits.files.value:
        raise limits.files.error()
    form = await context.bodies.read_bytes(request, lambda data: parse_form(data, boundary), limits.file_bytes)
    purpose = form.texts.pop("purpose", None)
    if purpose != BATCH:
        raise InvalidRequestError("purpose must be batch: files are for batches here", param="purpose")
    for given in form.texts:
        text = unknown_name_message("field", given[:64], ("file", "purpose"))
        if given.startswith("expires_after"):
            text = "expires_after is not supported: the server keeps everything equally long (--store-days)"
        raise InvalidRequestError(text, param=given[:64])
    await store.check_room(owner, len(form.content))
    made = file_object(owner, new_file_id(), form.filename, BATCH, len(form.content))
    pieces = range(0, len(form.content), PIECE_BYTES)
    parts = [Part(number, form.content[at : at + PIECE_BYTES]) for number, at in enumerate(pieces)]
    await store.write(Put(made, limits.files), AddParts(made.id, owner, parts))
    return JSONResponse(made.body)


async def list_files(request: Request) -> Response:
    """Files, newest first."""
    context: ServerContext = request.app.state.context
    page = page_of(request, descending=True, most=MOST_LISTED)
    found = await store_of(context.store).objects(
        KIND, caller_of(request.scope), page, request.query_params.get("purpose")
    )
    return JSONResponse(listing([item.body for item in found], page.limit))


async def retrieve_file(request: Request) -> Response:
    """One file, without its content."""
    return JSONResponse((await _found(request)).body)


async def file_content(request: Request) -> Response:
    """The content of a file."""
    context: ServerContext = request.app.state.context
    found = await _found(request)
    return StreamingResponse(pieces_of(store_of(context.store), found.id), media_type="application/octet-stream")


async def delete_file(request: Request) -> Response:
    """Forget a file that no batch reads."""
    context: ServerContext = request.app.state.context
    found, store = await _found(request), store_of(context.store)
    if any(batch.body["input_file_id"] == found.id for batch in await store.list_open("batch")):
        raise InvalidRequestError("a batch that runs reads this file: cancel it first", param="id")
    await store.write(Remove(found.id))
    return JSONResponse({"id": found.id, "object": "file", "deleted": True})


async def pieces_of(store: Store, name: str) -> AsyncGenerator[bytes, None]:
    """The content of a file, some of it at a time."""
    start = 0
    while parts := await store.parts(name, start=start, limit=PARTS_READ):
        for part in parts:
            yield part.content
        assert parts[-1].number is not None
        start = parts[-1].number + 1


async def _found(request: Request) -> Stored:
    context: ServerContext = request.app.state.context
    name = request.path_params["id"]
    found = await store_of(context.store).get(KIND, caller_of(request.scope), name)
    if found is None:
        raise not_found("file", name)
    return found


ROUTES = (
    Route("/v1/files", create_file, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{id}", retrieve_file, methods=["GET"]),
    Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/content", file_content, methods=["GET"]),
)
