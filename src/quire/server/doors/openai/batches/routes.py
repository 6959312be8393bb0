"""/v1/batches: create, retrieve, list, cancel; and what runs them again after a restart."""

import secrets
import time
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.errors import InvalidRequestError
from quire.server.doors.openai.batches import files
from quire.server.doors.openai.batches.runner import KIND, Runner, job_name
from quire.server.doors.openai.bodies import METADATA, Metadata
from quire.server.doors.openai.conversation import one_of
from quire.server.doors.openai.describe import error_body
from quire.server.http.context import ServerContext
from quire.server.http.keys import caller_of
from quire.server.http.schema import Field, Refused, RequestSchema
from quire.server.http.stored import Put, Stored, listing, not_found, page_of, store_of

DAY_SECONDS = 86400
_Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]


class BatchBody(msgspec.Struct, kw_only=True):
    """POST /v1/batches."""

    input_file_id: Annotated[str, Field("a file of purpose batch: a request on each line")]
    endpoint: Annotated[_Endpoint, Field("the route that all lines ask", one_of(_Endpoint))]
    completion_window: Annotated[Literal["24h"], Field("after which lines that were not asked are given up", "be 24h")]
    metadata: Annotated[Metadata | None, Field("labels that are kept with it", METADATA)] = None
    output_expires_after: Annotated[Any, Refused("the server keeps everything equally long (--store-days)")] = None


BATCH = RequestSchema(BatchBody)


async def create_batch(request: Request) -> Response:
    """Begin to work on the lines of a file."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: BATCH.read(raw, context.limits))
    owner, store = caller_of(request.scope), store_of(context.store)
    file = await store.get(files.KIND, owner, body.input_file_id)
    if file is None or file.body["purpose"] != files.BATCH:
        error = not_found("file of purpose batch", body.input_file_id)
        error.param = "input_file_id"
        raise error
    await store.check_room(owner, file.body["bytes"])
    made = Stored(f"batch_{secrets.token_hex(16)}", KIND, owner, {}, int(time.time()), is_open=True)
    made.body.update(_begun(made, body))
    await store.write(Put(made, context.limits.batches))
    _run(context, made)
    return JSONResponse(made.body)


def _begun(made: Stored, body: BatchBody) -> dict[str, Any]:
    stamps = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": made.id,
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": made.created_s,
        "expires_at": made.created_s + DAY_SECONDS,
        **{f"{name}_at": None for name in stamps},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
    }


async def retrieve_batch(request: Request) -> Response:
    """One batch."""
    return JSONResponse((await _found(request)).body)


async def list_batches(request: Request) -> Response:
    """Batches, newest first."""
    context: ServerContext = request.app.state.context
    page, owner = page_of(request, descending=True), caller_of(request.scope)
    found = await store_of(context.store).objects(KIND, owner, page)
    return JSONResponse(listing([_now(context, item).body for item in found], page.limit))


async def cancel_batch(request: Request) -> Response:
    """End a batch; what is answered can be had."""
    context: ServerContext = request.app.state.context
    found = await _found(request)
    if not found.is_open:
        text = f"this batch is {found.body['status']}: only one that is worked on can be cancelled"
        raise InvalidRequestError(text, param="id")
    runner = context.jobs.subject(job_name(found))
    await context.jobs.cancel(job_name(found))
    if isinstance(runner, Runner) and runner.batch.is_open:
        await runner.finish("cancelled")
    return JSONResponse((await _found(request)).body)


async def begin_again(context: ServerContext) -> None:
    """Go on with the batches that were worked on when the server stopped."""
    if context.store is not None:
        for batch in await context.store.list_open(KIND):
            if job_name(batch) not in context.jobs:
                _run(context, batch)


def _run(context: ServerContext, batch: Stored) -> None:
    runner = Runner(context, batch, error_body)
    context.jobs.start(job_name(batch), runner.work(), runner)


def _now(context: ServerContext, found: Stored) -> Stored:
    """As it is at this moment: what is written lags behind."""
    runner = context.jobs.subject(job_name(found))
    return runner.batch if isinstance(runner, Runner) else found


async def _found(request: Request) -> Stored:
    context: ServerContext = request.app.state.context
    name = request.path_params["id"]
    found = await store_of(context.store).get(KIND, caller_of(request.scope), name)
    if found is None:
        raise not_found("batch", name)
    return _now(context, found)


ROUTES = (
    *files.ROUTES,
    Route("/v1/batches", create_batch, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{id}", retrieve_batch, methods=["GET"]),
    Route("/v1/batches/{id}/cancel", cancel_batch, methods=["POST"]),
)
