"""/v1/models in Anthropic's shape."""

import secrets
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quire.errors import InvalidRequestError
from quire.server.http.context import ServerContext

MOST_IN_A_PAGE, USUAL_PAGE = 1000, 20
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_SERVER_TOOLS = ("code_execution", "web_search")
_PAGING = ("limit", "after_id", "before_id")
_STAGES = ("active", "deprecated", "retired")


async def list_models(request: Request) -> Response:
    """The models that are there, a page of them."""
    context: ServerContext = request.app.state.context
    there = dict(context.shown())
    names = list(there) if _wants_active(request) else []
    limit, after, before = (request.query_params.get(name) for name in _PAGING)
    count = USUAL_PAGE if limit is None else _count(limit)
    if after is not None and before is not None:
        raise InvalidRequestError("after_id and before_id exclude each other", param="before_id")
    if before is not None:
        rest = names[: _place(names, before, "before_id")]
        page = rest[-count:]
    else:
        rest = names if after is None else names[_place(names, after, "after_id") + 1 :]
        page = rest[:count]
    first, last = (page[0], page[-1]) if page else (None, None)
    cards = [_card(there[name], name) for name in page]
    content = {"data": cards, "has_more": len(page) < len(rest), "first_id": first, "last_id": last}
    return _answer(content)


async def retrieve_model(request: Request) -> Response:
    """One model."""
    context: ServerContext = request.app.state.context
    name = context.resolve_name(request.path_params["name"])
    return _answer(_card(context.of_model(name), name))


def _answer(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"request-id": f"req_{secrets.token_hex(12)}"})


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= MOST_IN_A_PAGE):
        raise InvalidRequestError(f"limit must be a whole number from 1 to {MOST_IN_A_PAGE}", param="limit")
    return int(text)


def _wants_active(request: Request) -> bool:
    """Whether models that are served are asked for: all of them are active."""
    query = request.query_params
    given = ",".join([*query.getlist("lifecycle"), *query.getlist("lifecycle[]")])
    if any(stage not in _STAGES for stage in given.split(",") if given):
        raise InvalidRequestError(f"lifecycle must be one of {', '.join(_STAGES)}", param="lifecycle")
    return not given or "active" in given.split(",")


def _place(names: list[str], name: str, param: str) -> int:
    if name not in names:
        raise InvalidRequestError(f"{param} is {name[:64]!r}, which is no model of the list", param=param)
    return names.index(name)


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    engine = context.engine
    answers = engine.answer_format
    reasons = answers is not None and answers.reasoning is not None
    created = datetime.fromtimestamp(context.started_s, UTC).isoformat().replace("+00:00", "Z")
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created,
        "deprecated_at": None,
        "retires_at": None,
        "lifecycle": "active",
        "line": None,
        "max_input_tokens": engine.max_model_len - 1,
        "max_tokens": engine.max_model_len - 1,
        "capabilities": {
            **{
                name: {"supported": False}
                for name in ("batch", "citations", "code_execution", "image_input", "pdf_input", "context_management")
            },
            "server_tools": {"supported": False, **{name: {"supported": False} for name in _SERVER_TOOLS}},
            "effort": {"supported": True, **{level: {"supported": True} for level in _EFFORTS}},
            "structured_outputs": {"supported": True},
            "thinking": {
                "supported": reasons,
                "types": {
                    "enabled": {"supported": reasons},
                    "adaptive": {"supported": True},
                    "disabled": {"supported": True},
                    "between_tools": {"supported": False},
                },
            },
        },
    }
