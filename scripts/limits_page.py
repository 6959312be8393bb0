"""The page of limits, docs/guide/limits.md, made from the table that the server goes by.

python -m scripts.limits_page          writes it
python -m scripts.limits_page --check  exits 1 when it is not what it would write
"""

import sys
from dataclasses import fields
from pathlib import Path

from quire.server import limits
from quire.server.limits import FIXED, Limit, Limits

PAGE = Path(__file__).parents[1] / "docs/guide/limits.md"
HEAD = """# Limits

<!-- Made by `python -m scripts.limits_page` from src/quire/server/limits.py: edit there. -->

Every bound that a request can meet, with the error past it. An error has OpenAI's shape and names the field and
the number: `{"error": {"message", "type", "param", "code"}}`. The same numbers stand in the API's own description,
`GET /openapi.json`.

## Of the HTTP door

`quire serve --limit NAME=VALUE` sets one; the flag may be repeated.

| name | what | default | unit | status | code |
|---|---|---|---|---|---|
"""
FIXED_HEAD = """
## Of every door

These hold for the library and the server alike and have no flag. Past them the status is 400.

| field | may be | unit | code |
|---|---|---|---|
"""
OTHERS_HEAD = """
## Of connections

| what | value | past it |
|---|---|---|
"""
OTHERS = (
    ("request line and headers", f"{limits.HEADER_BYTES:,} bytes", "400, and the connection is closed"),
    ("sending the headers", f"{limits.HEADER_SECONDS} seconds", "the connection is closed"),
    ("an idle connection", f"{limits.KEEP_ALIVE_SECONDS} seconds", "the connection is closed"),
    ("a reader that takes nothing of a stream", f"{limits.SLOW_READER_SECONDS} seconds", "the request is aborted"),
    ("running requests after SIGTERM", f"{limits.DRAIN_SECONDS} seconds; `--shutdown-timeout`", "an error event"),
)


def page() -> str:
    """The text of the page."""
    table = Limits()
    rows = [(item.name, getattr(table, item.name)) for item in fields(Limits)]
    return "".join(
        [
            HEAD,
            *(_row(f"`{name}`", *_cells(limit)) for name, limit in rows),
            FIXED_HEAD,
            *(_row(f"`{item.param}`", item.value, item.unit, f"`{item.code}`") for item in FIXED),
            OTHERS_HEAD,
            *(_row(*item) for item in OTHERS),
        ]
    )


def _cells(limit: Limit) -> tuple[str, ...]:
    return limit.what, f"{limit.value:,}", limit.unit, str(limit.status), f"`{limit.code}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def main() -> int:
    """Write, or check."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/guide/limits.md is not what scripts.limits_page writes: run it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
