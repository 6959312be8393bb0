"""docs/guide/limits.md and the tables of the APIs' pages, made from the declarations that the server goes by.

python -m scripts.api_pages          writes them
python -m scripts.api_pages --check  exits 1 when they are not what it would write
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quire import sampling_params as sampling
from quire.cli.tgi import NOT_READ, TABLE, Needless, Rule, Spoken, Taken, Within
from quire.engine.chat import MAX_MESSAGES
from quire.engine.inputs import MAX_PRIORITY, MAX_SALT_BYTES
from quire.server.doors.anthropic import bodies as anthropic
from quire.server.doors.ollama import bodies as ollama
from quire.server.doors.openai import bodies
from quire.server.doors.openai.batches.routes import BATCH
from quire.server.doors.openai.bodies import CHAT, COMPLETION, DETOKENIZE, TOKENIZE_CHAT, TOKENIZE_TEXT
from quire.server.doors.openai.responses.bodies import (
    CONVERSATION,
    CONVERSATION_ITEMS,
    CONVERSATION_UPDATE,
    INPUT_TOKENS,
    RESPONSE,
)
from quire.server.doors.tgi.bodies import GENERATE, PARAMETERS, TOKENIZE
from quire.server.http import limits
from quire.server.http.limits import MAX_TIMEOUT_SECONDS, Limit, Limits
from quire.server.http.schema import Refused, RequestSchema

GUIDE = Path(__file__).parents[1] / "docs/guide"
BEGIN, END = "<!-- Made by `python -m scripts.api_pages` from the declarations: edit there. -->\n", "<!-- End. -->\n"
Schemas = dict[str, RequestSchema[Any]]
PAGES: dict[str, Schemas] = {
    "api.md": {
        "chat": CHAT,
        "completions": COMPLETION,
        "tokenize": TOKENIZE_TEXT,
        "tokenize ": TOKENIZE_CHAT,
        "detokenize": DETOKENIZE,
        "responses": RESPONSE,
        "input_tokens": INPUT_TOKENS,
        "conversations": CONVERSATION,
        "conversations ": CONVERSATION_UPDATE,
        "conversations' items": CONVERSATION_ITEMS,
        "batches": BATCH,
    },
    "anthropic.md": {"messages": anthropic.MESSAGES, "count_tokens": anthropic.COUNT},
    "ollama.md": {
        "chat": ollama.CHAT,
        "generate": ollama.GENERATE,
        "show": ollama.SHOW,
        "pull": ollama.PULL,
        "delete": ollama.DELETE,
        "copy": ollama.COPY,
        "options": ollama.OPTIONS_SCHEMA,
    },
    "tgi.md": {"generate": GENERATE, "parameters": PARAMETERS, "tokenize": TOKENIZE},
}
"""Page of the guide -> the bodies whose fields stand in it, by what it calls them."""
ROW = "| {} |\n"
HEAD = """# Limits

<!-- Made by `python -m scripts.api_pages` from src/quire/server/http/limits.py: edit there. -->

Every bound that a request can meet, with the error past it. An error has the shape of its API and names the field and
the number; OpenAI's is `{"error": {"message", "type", "param", "code"}}`. The same numbers stand in the API's own
description, `GET /openapi.json`.

## Of the server

`quire serve --limit NAME=VALUE` sets one; the flag may be repeated. Of what is held at one time (`all_bodies_bytes`,
`requests`) a caller may have as much as is left free, one alone half; `connections`, an idle one is closed first
([overload](overload.md)). `requests` and `connections` are at least four and eight times what may run and wait (5,120
and 10,240 by default), unless set; and at most what the process may open (`ulimit -n`), three quarters of it for
`requests`, even if set.

| name | what | default | unit | status | code |
|---|---|---|---|---|---|
"""
FIXED_HEAD = """
## Of the server and the library

These hold for the library and the server alike and have no flag. Past them the status is 400. (A `max_tokens` that does
not fit beside the prompt is refused by the server, and shortened to what fits by the library, as in vLLM.)

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
    ("a reader that takes nothing of its answer", f"{limits.SLOW_READER_SECONDS} seconds", "the request is aborted"),
    ("running requests after SIGTERM", f"{limits.DRAIN_SECONDS} seconds; `--shutdown-timeout`", "an error event"),
)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A bound that holds for every caller and has no flag: the refusal names `param`."""

    param: str
    value: str
    unit: str
    code: str = "invalid_value"


def _ranges() -> list[Fixed]:
    found = []
    for name, item in sampling.RANGES.items():
        edge = "above " if item.is_above_low else ""
        low, high = (f"{bound:,}" if item.is_whole else f"{bound:g}" for bound in (item.low, item.high))
        shown = "top_logprobs (chat), logprobs (completions)" if name == "logprobs" else name
        found.append(Fixed(shown, f"{edge}{low} to {high}", "whole number" if item.is_whole else "number"))
    return found


FIXED = (
    *_ranges(),
    Fixed("stop", str(sampling.MAX_STOP_STRINGS), "strings"),
    Fixed("stop, bad_words", f"{sampling.MAX_STOP_STRING_BYTES:,}", "bytes in each string"),
    Fixed("bad_words", str(sampling.MAX_BAD_WORDS), "words"),
    Fixed("stop_token_ids, allowed_token_ids, logit_bias", f"{sampling.MAX_TOKEN_LIST:,}", "tokens"),
    Fixed("logprob_token_ids", str(sampling.MAX_LOGPROB_TOKEN_IDS), "tokens"),
    Fixed("repetition_detection.max_pattern_size", f"0 to {sampling.MAX_PATTERN}", "tokens"),
    Fixed("metadata", str(bodies.MAX_METADATA), "pairs"),
    Fixed("metadata", str(bodies.MAX_METADATA_NAME), "characters in each name"),
    Fixed("metadata", str(bodies.MAX_METADATA_VALUE), "characters in each text"),
    Fixed("request_id", "1 to 64", "letters, digits and any of . _ : -"),
    Fixed("logit_bias", f"{sampling.BIAS.low:g} to {sampling.BIAS.high:g}", "bias of a token"),
    Fixed("priority", f"{-MAX_PRIORITY:,} to {MAX_PRIORITY:,}", "whole number"),
    Fixed("cache_salt", str(MAX_SALT_BYTES), "bytes"),
    Fixed("timeout", f"above 0 to {MAX_TIMEOUT_SECONDS:,}", "seconds"),
    Fixed("n, prompt", "--max-num-queued-reqs, --max-num-queued-tokens", "what one request may queue"),
    Fixed("messages", f"{MAX_MESSAGES:,}", "messages, for the library too"),
    Fixed("token ids", "below the width of the logits", "each id"),
    Fixed("prompt, messages", "--max-model-len less one", "tokens", "context_length_exceeded"),
    Fixed("prompt, messages", "--max-model-len times the longest token", "bytes", "context_length_exceeded"),
    Fixed("max_tokens", "--max-model-len less the prompt", "tokens", "context_length_exceeded"),
)


def limits_page() -> str:
    """The text of limits.md."""
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


def api_page(name: str = "api.md") -> str:
    """The text of an API's page: what stands there, with its tables made anew."""
    text = (GUIDE / name).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    parts = [*_tables(PAGES[name]), *(_launcher() if name == "tgi.md" else ())]
    return before + BEGIN + "".join(parts) + END + rest.partition(END)[2]


def _launcher() -> Iterator[str]:
    yield "### The launcher's flags and variables\n\n| flag | variable | becomes |\n|---|---|---|\n"
    for name, rule in TABLE.items():
        variable = name[2:].replace("-", "_").upper()
        yield _row(f"`{name}`", "not read" if variable in NOT_READ else f"`{variable}`", _becomes(rule))
    yield "\n"


def _becomes(rule: Rule) -> str:
    if isinstance(rule, Taken):
        return f"`{rule.flag}`" + (f" ({rule.shown})" if rule.shown else "")
    if isinstance(rule, Spoken):
        shown = {value: f"`{' '.join(words)}`" if words else "nothing" for value, words in rule.values.items()}
        return "; ".join(f"`{value}`: {what}" for value, what in shown.items()) + f". {rule.shown}"
    if isinstance(rule, Within):
        return f"nothing, up to {rule.most}; above: refused"
    if isinstance(rule, Needless):
        return f"nothing, and that is said: {rule.why}"
    neutral = ", ".join(f"`{value}`" for value in rule.neutral)
    return f"refused: {rule.why}" + (f" ({neutral} passes)" if neutral else "")


def _tables(schemas: Schemas) -> Iterator[str]:
    honoured: dict[tuple[str, str, str], list[str]] = {}
    refused: dict[tuple[str, str, str], list[str]] = {}
    most = len({route.strip() for route in schemas})
    for route, schema in schemas.items():
        properties = schema.json_schema(Limits())[0]["properties"]
        for name, field in schema.fields.items():
            names = ", ".join(f"`{item}`" for item in (name, *field.spec.aliases))
            if isinstance(field.spec, Refused):
                neutral = ", ".join(f"`{json.dumps(item)}`" for item in (None, *field.spec.neutral))
                refused.setdefault((names, neutral, field.spec.reason), []).append(route.strip())
            else:
                key = (names, _values(properties[name]), field.spec.text)
                honoured.setdefault(key, []).append(route.strip())
    yield "\n| field | where | value | what it does |\n|---|---|---|---|\n"
    yield from (_row(names, _where(routes, most), values, text) for (names, values, text), routes in honoured.items())
    yield "\n### Inside objects\n\n| field | of | value | what it does |\n|---|---|---|---|\n"
    yield from _inside(schemas)
    yield "\n### Refused, but for values that ask for nothing\n\n"
    yield "| field | where | let through | why |\n|---|---|---|---|\n"
    yield from (_row(names, _where(routes, most), values, text) for (names, values, text), routes in refused.items())
    yield "\n"


def _inside(schemas: Schemas) -> Iterator[str]:
    places: dict[tuple[str, str, str], list[str]] = {}
    for schema in schemas.values():
        components = schema.json_schema(Limits())[1]
        for place, struct, name, spec in schema.inside():
            values = _values(components[struct.__name__]["properties"][name])
            if isinstance(spec, Refused):
                values, text = "nothing", f"not supported: {spec.reason}"
            else:
                text = spec.text
            places.setdefault((f"`{name}`", values, text), []).append(f"`{place}`")
    for (name, values, text), found in places.items():
        yield _row(name, ", ".join(dict.fromkeys(found)), values, text)


def _where(routes: list[str], most: int) -> str:
    found = list(dict.fromkeys(routes))
    return "all" if len(found) == most else ", ".join(found)


def _values(schema: dict[str, Any]) -> str:
    """The values of a schema in a few words."""
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(filter(None, map(_values, schema["anyOf"]))))
    if "$ref" in schema:
        return "object"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{item}`" for item in schema["enum"])
    kind = schema.get("type", "object")
    if kind in ("integer", "number"):
        above = "" if "minimum" in schema else "above "
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
        return f"{above}{low:,} to {high:,}" if kind == "integer" else f"{above}{low:g} to {high:,g}"
    return {"null": "", "string": "text", "array": "list", "boolean": "true or false"}.get(kind, kind)


def _cells(limit: Limit) -> tuple[str, ...]:
    return limit.what, f"{limit.value:,}", limit.unit, str(limit.status), f"`{limit.code}`"


def _row(*cells: str) -> str:
    return ROW.format(" | ".join(cells))


def main() -> int:
    """Write, or check."""
    stale = 0
    for name, text in (("limits.md", limits_page()), *((name, api_page(name)) for name in PAGES)):
        if "--check" not in sys.argv[1:]:
            (GUIDE / name).write_text(text, encoding="utf-8")
        elif (GUIDE / name).read_text(encoding="utf-8") != text:
            print(f"docs/guide/{name} is not what scripts.api_pages writes: run it", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
