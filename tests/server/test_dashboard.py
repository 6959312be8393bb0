"""The live view: who may see it, what it is sent, and (where there is a browser) what it draws."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.cli.main import main
from quire.cli.top import lines
from quire.llm import AsyncLLM
from quire.server import dashboard
from quire.server.http.app import Observability
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until

STATIC = files("quire.server.dashboard") / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Running]:
    engine = AsyncLLM(str(tiny_model), max_num_seqs=4, num_gpu_blocks_override=64, max_model_len=256)
    instance = start(engine, pages=dashboard.VIEW)
    yield instance
    instance.stop()
    engine.close()


def text_of(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def ask(url: str, num_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": list(range(5, 25)), "max_tokens": num_tokens, "ignore_eos": True, **more}
    return httpx.post(url + "/v1/completions", json=body, timeout=PATIENCE_S)


def test_the_pages_are_small_and_load_nothing_from_elsewhere(served: Running) -> None:
    total = 0
    for path, (name, kind) in dashboard.PAGES.items():
        answer = httpx.get(served.url + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.text == text_of(name)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"https?://|//cdn|import\s*\(", answer.text)
        total += len(answer.content)
    assert total < 300_000
    assert httpx.get(served.url + "/ui/").headers["location"] == "/ui"
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in dashboard.PAGES.values()}


def test_every_word_is_there_in_both_languages() -> None:
    words = text_of("words.js")
    english, chinese = (set(re.findall(r"(\w+):", part)) for part in re.split(r"\n  zh: ", words.partition("en: {")[2]))
    used = set(re.findall(r'data-(?:word|placeholder)="(\w+)"', text_of("index.html")))
    for name in ("app.js", "views.js", "playground.js"):
        used |= set(re.findall(r'\bword\("(\w+)"\)', text_of(name)))
    assert used <= english and used <= chinese


def test_a_frame_is_what_the_engine_did(served: Running) -> None:
    before = httpx.get(served.url + "/ui/frame").json()
    assert ask(served.url).status_code == 200
    frame = httpx.get(served.url + "/ui/frame", params={"since": before["version"]}).json()
    (ended,) = frame["ended"][-1:]
    assert (ended["num_prompt"], ended["num_output"], ended["state"]) == (20, 8, "length")
    assert frame["num_blocks"] == 64 and frame["max_model_len"] == 256 and frame["model"]
    steps = [step for step in frame["steps"] if any(row[0] == ended["index"] for row in step[2])]
    assert [row[1] for step in steps for row in step[2]] == [20, *[1] * 7]
    assert [step[0] for step in frame["steps"]] == [*range(before["step"] + 1, frame["step"] + 1)]
    assert len(frame["cached"]) == frame["num_cached_blocks"] >= 1


def test_frames_come_until_the_viewer_goes(served: Running) -> None:
    for _ in range(dashboard.MOST_VIEWERS + 4):  # more than may look at one time: each has gone before the next
        with httpx.stream("GET", served.url + "/ui/frames", params={"every": 0.1}, timeout=PATIENCE_S) as answer:
            lines = answer.iter_lines()
            found = [json.loads(line.removeprefix("data: ")) for line in (next(lines) for _ in range(3)) if line]
            assert len(found) == 2 and found[1]["cached"] is None, "what has not changed is not sent again"
        assert wait_until(lambda: not viewers(served))


def viewers(served: Running) -> set[object]:
    found: set[object] = served.server.config.app.state.viewers  # type: ignore[union-attr]
    return found


def test_viewers_are_bounded(served: Running) -> None:
    streams = [
        httpx.stream("GET", served.url + "/ui/frames", timeout=PATIENCE_S) for _ in range(dashboard.MOST_VIEWERS)
    ]
    opened = [stream.__enter__() for stream in streams]
    try:
        assert wait_until(lambda: len(viewers(served)) == dashboard.MOST_VIEWERS)
        refused = httpx.get(served.url + "/ui/frames")
        assert refused.status_code == 429 and "8 viewers" in refused.text
        assert ask(served.url).status_code == 200
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    assert all(answer.status_code == 200 for answer in opened)
    assert wait_until(lambda: not viewers(served))


@pytest.mark.parametrize(
    ("path", "named"),
    [("/ui/frames?every=0.01", "every"), ("/ui/frames?every=x", "every"), ("/ui/frames?every=nan", "every"),
     ("/ui/frame?since=-2", "since"), ("/ui/frame?since=inf", "since")],
)  # fmt: skip
def test_bad_numbers_are_named(served: Running, path: str, named: str) -> None:
    answer = httpx.get(served.url + path)
    assert answer.status_code == 400 and named in answer.text


def test_who_may_see_it(tiny_model: Path) -> None:
    engine = AsyncLLM(str(tiny_model), max_num_seqs=2)
    watched = start(engine, api_key=["caller"], observability=Observability("admin"), pages=dashboard.VIEW)
    try:
        for path in dashboard.PAGES:
            assert httpx.get(watched.url + path).status_code == 200, "the pages hold nothing"
        for path in ("/ui/frame", "/ui/frames", "/ui/static"):
            assert httpx.get(watched.url + path).status_code == 401
            found = httpx.get(watched.url + path, headers={"Authorization": "Bearer caller"})
            assert found.status_code == 403 and "admin key" in found.text
        found = httpx.get(watched.url + "/ui/frame", headers={"Authorization": "Bearer admin"})
        assert found.status_code == 200
    finally:
        watched.stop()
        engine.close()


def test_static_batches_are_compared_when_enough_was_seen(served: Running) -> None:
    httpx.get(served.url + "/ui/frame")  # someone looks: steps are noted from now on
    callers = [threading.Thread(target=ask, args=(served.url, 4 + 40 * (n % 2))) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    found = httpx.get(served.url + "/ui/static", timeout=PATIENCE_S).json()
    assert found["continuous"] > 0 and found["static"] > 0


@pytest.mark.skipif(CHROMIUM is None or find_spec("playwright") is None, reason="needs Chromium and Playwright")
def test_what_is_drawn_is_what_the_engine_reports(served: Running) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(bypass_csp=True)  # for what the test itself evaluates
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(served.url + "/ui")
        page.wait_for_function("window.quire && window.quire.frames > 0")
        caller = threading.Thread(target=ask, args=(served.url, 200))
        caller.start()
        page.wait_for_function("window.quire.figures && window.quire.figures.own > 1")
        caller.join()
        page.wait_for_function("window.quire.requests.size === 0 && window.quire.figures.own === 0")
        frame = httpx.get(served.url + "/ui/frame").json()
        drawn = page.evaluate("window.quire.figures")
        assert drawn["cached"] == frame["num_cached_blocks"]
        assert drawn["cached"] + drawn["free"] == frame["num_free_blocks"] == 64
        for name in ("schedule", "machine", "playground"):
            page.keyboard.press("Tab")
            page.focus(f"#tab-{name}")
            page.keyboard.press("Enter")
            page.wait_for_selector(f"#{name}:not([hidden])")
        page.select_option("#language", "zh")
        assert page.inner_text("#tab-blocks") == "區塊"
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
        assert not faults
        browser.close()


def test_top_shows_the_same_in_text(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(served.url).status_code == 200
    assert main(["top", served.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 64 held" in shown and "16 tokens each" in shown
    assert main(["top", served.url, "--every", "0"]) == 2
    assert "every must be between" in capsys.readouterr().err


def test_top_fits_its_window(served: Running) -> None:
    frame = httpx.get(served.url + "/ui/frame").json()
    one = {"state": "decode", "reason": "", "num_prompt": 9, "num_output": 2, "blocks": [1, 2], "name": "x" * 200}
    frame["requests"] = [{**one, "index": number} for number in range(50)]
    shown = lines(frame, 80, 24)
    assert len(shown) == 23 and shown[-1] == "... and 34 more" and all(len(line) <= 80 for line in shown[2:])
