"""The page of what works with which client: fresh, and true by what the installed clients have and the doors take."""

import ast
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai.resources.models import Models
from starlette.routing import Match

from quire.server.doors.all import DOORS
from quire.server.doors.anthropic import bodies as anthropic
from quire.server.doors.ollama import bodies as ollama
from quire.server.doors.openai.batches.routes import BATCH
from quire.server.doors.openai.bodies import CHAT, COMPLETION
from quire.server.doors.openai.responses.bodies import CONVERSATION, INPUT_TOKENS, RESPONSE
from quire.server.http.schema import RequestSchema
from scripts import compatibility_page as page
from scripts.client_calls import CLIENTS, calls_of, method_of
from scripts.compatibility_marks import Asked, _of_file, asked_of, marks
from tests.server.client_calls import watched
from tests.server.conftest import pytest_runtest_makereport

BODIES: dict[tuple[str, str], RequestSchema[Any]] = {
    ("POST", "/v1/chat/completions"): CHAT,
    ("POST", "/v1/completions"): COMPLETION,
    ("POST", "/v1/responses"): RESPONSE,
    ("POST", "/v1/responses/input_tokens"): INPUT_TOKENS,
    ("POST", "/v1/conversations"): CONVERSATION,
    ("POST", "/v1/batches"): BATCH,
    ("POST", "/v1/messages"): anthropic.MESSAGES,
    ("POST", "/v1/messages/count_tokens"): anthropic.COUNT,
    ("POST", "/api/chat"): ollama.CHAT,
    ("POST", "/api/generate"): ollama.GENERATE,
    ("POST", "/api/show"): ollama.SHOW,
    ("POST", "/api/pull"): ollama.PULL,
    ("POST", "/api/copy"): ollama.COPY,
    ("DELETE", "/api/delete"): ollama.DELETE,
}
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "betas", "output_format"}
"""Arguments that never stand in a body under their names."""
HEADERS = {"user_profile_id", "workspace_id"}
"""Arguments that the client sends as headers, which are labels here."""


def is_locked(client: str) -> bool:
    """Of the locked version, so that a new release is met when the lock is made anew, and not by chance."""
    locked = (page.PAGE.parents[2] / "requirements/test.txt").read_text(encoding="utf-8")
    return f"{CLIENTS[client].package.replace('_', '-')}=={CLIENTS[client].version} " in locked


def test_the_page_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("sys.argv", ["compatibility_page", "--check"])
    assert page.main() == 0
    written = page.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    assert page.main() == 1, "there is none"
    page.PAGE.write_text(written.replace("| passes |", "| refused |", 1), encoding="utf-8")
    assert page.main() == 1


def test_only_cells_with_tests_are_compared_between_versions() -> None:
    made = "| [`a.A`](#a) 1.0 | 9 |\n| `x` |  | passes | [t](../../tests/server/t.py) |\nAbsent: `y`.\n"
    newer = made.replace("1.0 | 9", "1.1 | 10").replace("`y`", "`y`, `z`")
    assert not page.is_stale(newer, made) and not page.is_stale(made, made)
    assert page.is_stale(made.replace("`y`", "`z`"), made), "of the same version all is compared"
    assert page.is_stale(newer.replace("passes", "refused"), made)


def test_every_call_with_a_mark_is_one_of_the_client() -> None:
    every = marks()
    assert len(every) > 100 and {mark.asked.client for mark in every} == {*CLIENTS}
    for mark in every:
        method_of(mark.asked.client, mark.asked.call)
    with pytest.raises(AttributeError):
        method_of("openai", "models.none")


@pytest.mark.parametrize("client", page.SHOWN)
def test_what_is_called_absent_has_no_route(client: str) -> None:
    if not is_locked(client):
        pytest.skip(f"{CLIENTS[client].title} {CLIENTS[client].version} is not the locked version")
    known = {mark.asked.call for mark in marks() if mark.asked.client == client}
    headers = [(name.encode(), value.encode()) for name, value in CLIENTS[client].headers]
    for call in calls_of(client).values():
        for method, path in call.routes if call.name not in known else ():
            scope = {"type": "http", "method": method, "path": path, "headers": headers}
            found = [route.path for door in DOORS for route in door.routes if route.matches(scope)[0] is Match.FULL]
            assert not found, f"{call.name} asks for {found[0]}: make a test of it, with a mark"


@pytest.mark.parametrize("client", ["openai", "anthropic", "ollama"])
def test_every_argument_is_known_and_each_that_is_refused_has_a_mark(client: str) -> None:
    if not is_locked(client):
        pytest.skip(f"{CLIENTS[client].title} {CLIENTS[client].version} is not the locked version")
    marked: dict[str, set[str]] = {}
    for mark in marks():
        if mark.asked.client == client and mark.refused:
            marked.setdefault(mark.asked.call, set()).update(mark.asked.arguments)
    num_refused = 0
    for call in calls_of(client).values():
        schema = next((BODIES[route] for route in call.routes if route in BODIES), None)
        if schema is None or call.name.endswith("parse"):  # which is what create is, with a type
            continue
        given = {*inspect.signature(call.function).parameters} - OF_THE_CLIENT
        assert given - HEADERS <= {*schema.known()}, call.name
        refused = (given & {*schema.refused}) - HEADERS
        num_refused += len(refused)
        if not call.name.startswith("beta."):
            assert refused == marked.get(call.name, set()), call.name
        else:
            assert marked.get(call.name, set()) <= refused, call.name
    assert num_refused > 5


@pytest.mark.parametrize("text", ["chat(", "Chat", "chat()", "chat(a,b)", "chat a"])
def test_a_mark_that_is_no_call_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is no call"):
        list(asked_of(["openai", text]))


def test_a_mark_that_is_not_read_is_told() -> None:
    seen = 'import pytest\n@pytest.mark.client("openai", "chat(a, b)", "files.list")\ndef test_a(): ...\n'
    (first, second) = _of_file("f.py", ast.parse(seen))
    assert (first.asked, first.test) == (Asked("openai", "chat", ("a", "b")), "test_a")
    assert (str(second.asked), second.refused) == ("files.list", False)
    for hidden in ("pytestmark = pytest.mark.client('openai', 'files.list')\n", "X = [pytest.mark.client]\n"):
        with pytest.raises(ValueError, match="elsewhere"):
            list(_of_file("f.py", ast.parse(seen + hidden)))


class Marked:
    """A test with one mark."""

    def __init__(self, name: str, *arguments: str) -> None:
        self._mark = SimpleNamespace(name=name, args=("openai", *arguments))

    def iter_markers(self, name: str) -> list[Any]:
        return [self._mark] if name == self._mark.name else []


@pytest.mark.parametrize(("mark", "outcome"), [("client", "failed"), ("other", "skipped")])
def test_a_test_with_a_mark_may_not_be_skipped(mark: str, outcome: str) -> None:
    item: Any = SimpleNamespace(nodeid="t", get_closest_marker=lambda name: True if name == mark else None)
    reports: Any = pytest_runtest_makereport(item, SimpleNamespace())
    next(reports)
    with pytest.raises(StopIteration) as done:
        reports.send(SimpleNamespace(skipped=True, outcome="skipped", longrepr=None))
    assert done.value.value.outcome == outcome


@pytest.mark.parametrize(
    ("mark", "holds"),
    [
        (("client", "models.delete"), False),
        (("client", "models.list"), True),
        (("client", "models.list(extra_query)"), True),
        (("client", "models.list(extra_query, timeout)"), False),
        (("client", "models.retrieve"), False),
        (("client_refused", "models.list"), False),
        (("client_refused", "models.retrieve"), True),
        (("client_refused", "models.retrieve(timeout)"), True),
        (("client_refused", "models.retrieve(model)"), False),
    ],
)
def test_a_mark_that_is_not_true_fails(monkeypatch: pytest.MonkeyPatch, mark: tuple[str, str], holds: bool) -> None:
    def refuse(self: Any, model: str, *, timeout: float | None = None) -> None:
        raise ValueError("timeout is not supported")

    client = openai.OpenAI(api_key="none")
    monkeypatch.setattr(Models, "list", lambda self, extra_query=None, timeout=None: [])
    monkeypatch.setattr(Models, "retrieve", refuse)
    item: Any = Marked(*mark)
    with nullcontext() if holds else pytest.raises(AssertionError, match=r"not made|not refused"), watched(item):
        client.models.list(extra_query={"a": 1})
        client.models.list(timeout=5)
        with pytest.raises(ValueError):
            client.models.retrieve("a", timeout=5)
