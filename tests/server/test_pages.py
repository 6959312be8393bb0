"""Pages in a browser: who may use the server (CORS), and what `GET /` shows a person and a program."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import pytest
from starlette.testclient import TestClient

from quire.errors import ConfigurationError
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.app import create_app
from quire.server.http.cors import Cors, listed
from tests.server.conftest import MODEL, Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory

PAGE = "https://app.example"
KEY = {"authorization": "Bearer k"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def paged() -> Iterator[Running]:
    instance = start(FakeEngine(), api_key="k", cors=Cors(origins=(PAGE, "http://localhost:3000")))
    yield instance
    instance.stop()


def browser_lets_through(url: str, origin: str, headers: dict[str, str], body: object) -> httpx.Response | None:
    """What a script of a page at `origin` gets of `fetch(url, ...)`: the CORS protocol of the Fetch standard, for a
    request without credentials whose content type is JSON; None is its network error."""
    sent = {"origin": origin, "content-type": "application/json"}
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": ",".join(sorted(["content-type", *headers])),
    }
    preflight = httpx.options(url, headers={"origin": origin, **asked})
    allowed = {word.strip().lower() for word in preflight.headers.get("access-control-allow-headers", "").split(",")}
    methods = {word.strip() for word in preflight.headers.get("access-control-allow-methods", "").split(",")}
    if not preflight.is_success or preflight.headers.get("access-control-allow-origin") not in (origin, "*"):
        return None
    if not methods & {"POST", "*"} or not {"content-type", *headers} <= allowed:  # `*` does not cover authorization
        return None
    response = httpx.post(url, headers={**sent, **headers}, json=body)
    return response if response.headers.get("access-control-allow-origin") in (origin, "*") else None


def test_a_page_of_a_named_origin_may_chat_and_read_its_answer(paged: Running) -> None:
    url = f"{paged.url}/v1/chat/completions"
    answer = browser_lets_through(url, PAGE, KEY, CHAT)
    assert answer is not None and answer.json()["choices"][0]["message"]["content"] == "ab"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    streamed = browser_lets_through(url, "http://localhost:3000", KEY, {**CHAT, "stream": True})
    assert streamed is not None and streamed.text.endswith("data: [DONE]\n\n")
    assert browser_lets_through(url, "https://other.example", KEY, CHAT) is None


def test_a_page_can_read_why_its_request_was_refused(paged: Running) -> None:
    url = f"{paged.url}/v1/chat/completions"
    for headers, body, status in (({}, CHAT, 401), (KEY, {**CHAT, "n": 0}, 400)):
        refused = browser_lets_through(url, PAGE, headers, body)
        assert refused is not None and refused.status_code == status
    paged.engine.is_full = True
    try:  # each on a connection of its own, whose first bytes are looked at unparsed
        full = browser_lets_through(url, PAGE, KEY, CHAT)
        assert full is not None and (full.status_code, full.headers["retry-after"]) == (503, "3")
        assert "Retry-After" in full.headers["access-control-expose-headers"]
    finally:
        paged.engine.is_full = False


def test_without_the_flag_no_page_gets_anything(running: Running) -> None:
    assert browser_lets_through(f"{running.url}/v1/chat/completions", PAGE, {}, CHAT) is None
    assert "access-control-allow-origin" not in httpx.get(f"{running.url}/", headers={"origin": PAGE}).headers


@pytest.mark.parametrize(
    ("origins", "site", "status"),
    [((), "cross-site", 403), ((), "same-site", 403), ((), "same-origin", 200), ((), None, 200),
     (("*",), "cross-site", 200), ((PAGE,), "cross-site", 200), (("https://other.example",), "cross-site", 403)],
)  # fmt: skip
def test_a_form_is_taken_of_no_page_that_is_not_let_in(origins: tuple[str, ...], site: str | None, status: int) -> None:
    """Browsers send forms to any server without asking it."""
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name=MODEL, cors=Cors(origins=origins), store=memory())
    headers = {"origin": PAGE, **({} if site is None else {"sec-fetch-site": site})}
    client = TestClient(app, headers=headers)
    found = client.post("/v1/files", files={"file": ("x", b"{}")}, data={"purpose": "batch"})
    assert found.status_code == status
    if status == 403:
        assert found.json()["error"]["code"] == "foreign_page" and "--allowed-origins" in found.text
        assert client.post("/v1/responses/resp_1/cancel").status_code == 403


@pytest.mark.parametrize(
    ("host", "hosts", "status"),
    [("localhost:8000", (), 200), ("127.0.0.1", (), 200), ("[::1]:8000", (), 200), ("app.localhost", (), 200),
     ("evil.example", (), 403), ("evil.example:8000", ("quire.example",), 403),
     ("QUIRE.example:8000", ("quire.example",), 200),
     ("127.0.0.1.evil.example", (), 403), ("localhost.evil.example", (), 403), ("evil.example", ("*",), 200)],
)  # fmt: skip
def test_a_name_that_points_here_is_not_this_servers(host: str, hosts: tuple[str, ...], status: int) -> None:
    """A page of evil.example may let its name point to 127.0.0.1: it is then of the server's own origin."""
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name=MODEL, cors=Cors(hosts=hosts))
    found = TestClient(app, base_url="http://testserver", headers={"host": host}).get("/v1/models")
    assert found.status_code == status
    if status == 403:
        assert found.json()["error"]["code"] == "unknown_host" and "--allowed-hosts" in found.text


def test_every_origin_may_be_let_in() -> None:
    instance = start(FakeEngine(), cors=Cors(origins=("*",)))
    try:
        for origin in (PAGE, "null"):
            assert browser_lets_through(f"{instance.url}/v1/chat/completions", origin, {}, CHAT) is not None
    finally:
        instance.stop()


@pytest.mark.parametrize("origin", ["https://app.example/", "app.example", "localhost:3000", "https://a b", "", "/dir"])
def test_what_no_browser_sends_as_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Cors(origins=(origin,))
    assert caught.value.field == "allowed_origins" and "scheme://host:port" in str(caught.value)


def test_lists_are_words_or_json_as_vllm_takes_them() -> None:
    assert listed([PAGE, '["http://a", "http://b"]'], "x") == (PAGE, "http://a", "http://b")
    for wrong in ("[", "[1]"):
        with pytest.raises(ConfigurationError):
            listed([wrong], "allowed_origins")
    with pytest.raises(ConfigurationError):
        Cors(origins=("*",), methods=("PO ST",))


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == "href" and value]


def test_the_root_says_what_this_is_and_links_on(http: httpx.Client) -> None:
    found = http.get("/")
    content = json.loads(found.text)
    assert (content["name"], content["models"], content["base_path"]) == ("quire", [MODEL], "/v1")
    assert found.headers["vary"] == "Accept"
    page = http.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html") and MODEL in page.text
    links = Links()
    links.feed(page.text)
    assert sorted(links.found) == sorted(content["links"].values())
    for path in links.found:
        assert http.get(path).status_code == 200, path


def test_names_cannot_write_markup_into_the_page() -> None:
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name="<script>x</script>")  # type: ignore[arg-type]
    page = TestClient(app).get("/", headers={"accept": "text/html"})
    assert "<script>" not in page.text and "&lt;script&gt;" in page.text
