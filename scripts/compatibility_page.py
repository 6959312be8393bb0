"""docs/guide/compatibility.md, made from what the tests say that they ask of clients.

python -m scripts.compatibility_page          writes it
python -m scripts.compatibility_page --check  exits 1 when it is not what it would write

A cell is a mark of a test (`tests/server/client_calls.py`), which fails where the mark is not true. What no test asks
is absent: `tests/law/test_compatibility.py` sees that no route is there for it. Where another version of a client is
installed than the page names, only the cells with tests are compared. Clients that the tests do not bring are run by
`scripts/clients.py --json scripts/clients.json`.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.client_calls import CLIENTS, calls_of
from scripts.clients import CASES
from scripts.compatibility_marks import Mark, marks

PAGE = Path(__file__).parents[1] / "docs/guide/compatibility.md"
OUTSIDE = Path(__file__).parent / "clients.json"
SHOWN = ("openai", "anthropic", "ollama", "huggingface_hub")
GUIDES = {"openai": "api.md", "anthropic": "anthropic.md", "ollama": "ollama.md", "huggingface_hub": "tgi.md"}
HEAD = """# What works with which client

<!-- Made by `python -m scripts.compatibility_page` from the marks of the tests: edit there. -->

Every client is the official one, unchanged, of the version that the tests run with. **passes**: a test makes this
call, with these arguments, and checks the answer. **refused**: the answer is an error that names the call or the
argument. **absent**: no test asks it, and the server has no route for it: the answer is 404 or 405. (The hub's other
tasks all send their input to `POST /`, where text is generated: their answers are of no use.) A cell links to its
tests. Each fails when what stands here is not what it does, or when it is skipped: CI would fail before this page said
more than is true.

| client | calls | pass | are refused | absent |
|---|---|---|---|---|
"""
OUTSIDE_HEAD = """
## Other clients

CI does not have these: they are run by hand, by `scripts/clients.py`, over `quire serve` with the embedded model.

| client | what it does | outcome, last run |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    every = marks()
    sections = "".join(_section(name, [mark for mark in every if mark.asked.client == name]) for name in SHOWN)
    totals = "".join(_totals(name, every) for name in SHOWN)
    return HEAD + totals + sections + _more_clients(every) + _outside()


def _calls(every: Iterable[Mark], name: str, *, refused: bool) -> set[str]:
    """Those that pass, in one way at least; or those that are refused whatever they are given."""
    here = [mark for mark in every if mark.asked.client == name]
    if not refused:
        return {mark.asked.call for mark in here if not mark.refused}
    return {mark.asked.call for mark in here if mark.refused and not mark.asked.arguments}


def _totals(name: str, every: list[Mark]) -> str:
    client, calls = CLIENTS[name], calls_of(name)
    passing, refused = _calls(every, name, refused=False), _calls(every, name, refused=True)
    absent = len(calls) - len(passing | refused)
    link = f"[`{client.title}`](#{name}) {client.version}"
    return f"| {link} | {len(calls)} | {len(passing)} | {len(refused - passing)} | {absent} |\n"


def _section(name: str, here: list[Mark]) -> str:
    client, calls = CLIENTS[name], calls_of(name)
    known = {mark.asked.call for mark in here}
    lines = [
        f"\n## {name}\n",
        f"`{client.title}`, version {client.version}; its fields: [{GUIDES[name]}]({GUIDES[name]}).\n",
    ]
    lines += ["| call | with | outcome | tests |", "|---|---|---|---|"]
    groups: dict[str, list[str]] = {}
    for call in calls:
        if call in known:
            lines += _rows(call, [mark for mark in here if mark.asked.call == call])
        else:
            groups.setdefault(_group(call, known), []).append(call)
    absent = [
        f"`{group}` ({len(found)} calls)" if len(found) > 1 else f"`{found[0]}`" for group, found in groups.items()
    ]
    return "\n".join(lines) + f"\n\nAbsent: {', '.join(absent)}.\n"


def _rows(call: str, here: list[Mark]) -> Iterator[str]:
    for refused in (False, True):
        ways = dict.fromkeys(mark.asked.arguments for mark in here if mark.refused is refused)
        for arguments in sorted(ways, key=lambda one: (bool(one), *one)):
            tests = dict.fromkeys((mark.test, mark.file) for mark in here
                                  if mark.refused is refused and mark.asked.arguments == arguments)  # fmt: skip
            links = ", ".join(f"[{_said(test)}](../../tests/server/{file})" for test, file in tests)
            shown = ", ".join(f"`{argument}`" for argument in arguments)
            yield f"| `{call}` | {shown} | {'refused' if refused else 'passes'} | {links} |"


def _said(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def _group(call: str, known: set[str]) -> str:
    """The call itself, or the nearest to the client of what holds it and no call with a test."""
    parts = call.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if not any(other.startswith(prefix) for other in known):
            return prefix + "*"
    return call


def _more_clients(every: list[Mark]) -> str:
    """What is asked through the asynchronous classes, which send the same requests."""
    found = ["\n## The asynchronous clients\n", "They send the same requests; through them are tested:\n"]
    for name in SHOWN:
        other = f"{name} async"
        here = [mark for mark in every if mark.asked.client == other]
        tests = dict.fromkeys((mark.test, mark.file) for mark in here)
        links = ", ".join(f"[{_said(test)}](../../tests/server/{file})" for test, file in tests)
        said = ", ".join(f"`{mark.asked}`" for mark in here)
        found.append(f"- `{CLIENTS[other].title}`: {said} ({links})")
    return "\n".join(found) + "\n"


def _outside() -> str:
    run: dict[str, str] = json.loads(OUTSIDE.read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], list[str]] = {}
    for client, does, _ in CASES:
        line = re.compile(rf"({re.escape(client)} \S+): {re.escape(does)}")
        ended = {found[1]: outcome for name, outcome in run.items() if (found := line.fullmatch(name))}
        for name, outcome in (ended or {client: "not run"}).items():
            rows.setdefault((name.replace(client, f"`{client}`"), outcome), []).append(f"`{does}`")
    lines = [f"| {client} | {', '.join(does)} | {outcome} |\n" for (client, outcome), does in sorted(rows.items())]
    return OUTSIDE_HEAD + "".join(lines)


def comparable(text: str) -> str:
    """What does not depend on the version of a client: the cells with tests."""
    return "\n".join(line for line in text.splitlines() if "](../../tests/" in line)


def is_stale(written: str, made: str) -> bool:
    """Whether a page must be made again."""
    versions = [re.findall(r"^\| \[`\w+\.\w+`\]\(#\w+\) (\S+)", text, re.MULTILINE) for text in (written, made)]
    return written != made if versions[0] == versions[1] else comparable(written) != comparable(made)


def main() -> int:
    """Write, or check."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if is_stale(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "", made):
        print("docs/guide/compatibility.md is not what scripts.compatibility_page writes: run it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
