"""The live view: who may see it, what it is sent, and (where there is a browser) what it draws."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.cli import machine_rates
from quire.cli.main import main
from quire.cli.top import lines
from quire.llm import AsyncLLM
from quire.server import dashboard
from quire.server.http.app import Observability
from tests.cli.test_verbs import ENVIRONMENT
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
    assert httpx.get(served.url).json()["links"]["live view"] == "/ui"
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
    for last, step in itertools.pairwise(frame["steps"]):
        step[2] = last[2] if step[2] is None else step[2]
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
        for path in ("/ui/frame", "/ui/frames", "/ui/static", "/ui/machine"):
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
    frame = httpx.get(served.url + "/ui/frame").json()
    assert frame["read_bytes_per_s"] > frame["weight_bytes"] > 10_000
    for name in ("continuous", "static"):
        spans = found["spans"][name]
        assert len(spans) >= 8 and min(arrival for arrival, _, _ in spans) == 0
        assert all(arrival <= first <= last for arrival, first, last in spans)


def test_the_view_may_have_a_port_of_its_own(tiny_model: Path) -> None:
    """`--ui-port`: there the whole server answers, as the playground needs it; at the other port there is no view."""
    words = ["serve", str(tiny_model), "--port", "0", "--ui-port", "0", "--quiet", "--max-num-seqs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", *words], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if "ready on" in line)
        (url, ui), _ = re.findall(r"http://[\d.:]+", ready), process.stderr
        assert url != ui
        for path in (*dashboard.PAGES, "/ui/", "/ui/frame", "/ui/static", "/ui/machine"):
            assert httpx.get(ui + path).status_code in (200, 308)
            refused = httpx.get(url + path)
            assert refused.status_code == 404 and ui.rpartition(":")[2] in refused.text
        assert ask(url).status_code == ask(ui).status_code == 200
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        assert "live view:" not in process.stderr.read()
        process.stderr.close()


@pytest.mark.parametrize(
    ("words", "text"),
    [(["--ui-port", "65536"], "ui_port must be between 0 and 65535"),
     (["--ui-port", "8000"], "ui_port must be another port than 8000")],
)  # fmt: skip
def test_a_bad_port_of_the_view_is_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert text in capsys.readouterr().err


def test_the_roof_is_what_was_measured_on_this_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine_rates.kept_read_rates() is None
    path = machine_rates.cache_file()
    path.parent.mkdir()
    kept = {
        "machine": f"{machine_rates._processor()}, avx2, 2 threads",
        "rates": {"read": [[1024, 5e10], [2**30, 2e10]]},
    }
    path.write_text(json.dumps(kept))
    assert machine_rates.kept_read_rates() == [(1024, 5e10), (2**30, 2e10)]
    for bad in (
        "",
        "[]",
        "{}",
        json.dumps({**kept, "machine": "another"}),
        json.dumps({**kept, "rates": {"read": [1]}}),
    ):
        path.write_text(bad)
        assert machine_rates.kept_read_rates() is None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or find_spec("playwright") is None:
        pytest.skip("needs Chromium and Playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, served: Running) -> Iterator[Any]:
    """The view, which must not raise."""
    found = browser.new_page(bypass_csp=True)  # for what the test itself evaluates
    found.set_default_timeout(PATIENCE_S * 1000)
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.goto(served.url + "/ui")
    found.wait_for_function("window.quire && window.quire.frames > 0")
    yield found
    found.close()
    assert not faults


def test_what_is_drawn_is_what_the_engine_reports(served: Running, page: Any) -> None:
    seen = threading.Event()

    def call() -> None:
        while not seen.is_set():  # one answer may come and go between two frames
            ask(served.url, 200)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        page.wait_for_function("window.quire.figures && window.quire.figures.own > 1")
    finally:
        seen.set()
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


def test_memory_is_what_each_way_would_hold(served: Running, page: Any) -> None:
    """Of the requests that have ended, against the sizes that the server reports of them."""
    assert ask(served.url, 33).status_code == 200
    page.wait_for_function("window.quire.ended.some((one) => one.num_output === 33)")
    ended = [one for one in httpx.get(served.url + "/ui/frame").json()["ended"] if one["state"] in ("stop", "length")]
    page.wait_for_function(f"window.quire.figures?.ended === {len(ended)}")
    then = page.evaluate("window.quire.figures.then")
    lengths = [one["num_prompt"] + one["num_output"] for one in ended]
    assert then["oracle"] == then["used"] == sum(lengths)
    assert then["paged"] == sum(-(-one // 16) * 16 for one in lengths)
    assert then["longest"] == 256 * len(ended)
    assert then["pow2"] == sum(
        min(256, one["num_prompt"] + (1 << (one["num_output"] - 1).bit_length())) for one in ended
    )
    cells = page.locator("#memory tr[data-name=paged] td.number").all_inner_texts()
    assert cells[1] == f"{100 * (1 - sum(lengths) / then['paged']):.1f} %"
    held = "({holders: [1], cached: false})"
    grid = f"[{held}, ...Array(3).fill(({{holders: []}})), {held}, {{holders: []}}]"
    assert page.evaluate(f"import('/ui/views.js').then((views) => views.fragmentation({grid}))") == 0.25


def test_a_step_can_be_read_with_the_keyboard_and_batches_beside_it(served: Running, page: Any) -> None:
    callers = [threading.Thread(target=ask, args=(served.url, 4 + 60 * (n % 2))) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    page.click("#tab-schedule")
    page.wait_for_function("window.quire.compared && window.quire.figures.steps > 20")
    page.focus("#schedule-canvas")
    page.keyboard.press("ArrowRight")
    assert re.match(r"step \d+, .*: (prefill|decode|did not advance)|^step", page.inner_text("#schedule-at"))
    assert len(page.evaluate("window.quire.compared.spans.static")) >= 8
    ends = page.evaluate(
        "import('/ui/views.js').then((v) => v.batchEnds([[0, 1, 2], [0, 1, 5], [0, 6, 7], [0, 6.5, 6.6]]))"
    )
    assert ends == [5, 5, 7, 7]


def test_reasons_are_counted_and_preemptions_drawn_apart(page: Any) -> None:
    page.click("#tab-schedule")
    page.evaluate("window.quire.steps = [[7, 0, [], [[2, 'no_row'], [3, 'preempted']]], [8, 0, [], [[2, 'no_row']]]]")
    page.evaluate("dispatchEvent(new Event('resize'))")
    page.wait_for_function("document.getElementById('schedule-summary').textContent.includes('no row 2, preempted 1')")
    page.evaluate("""import('/ui/views.js').then((views) => { window.drawn = views.drawSchedule(document.getElementById(
        'schedule-canvas'), {steps: [[7, 0, [[1, 5, false]], [[2, 'preempted'], [3, 'no_blocks']]]]}, null) })""")
    assert page.evaluate("window.drawn.preempted") == 1


def test_the_machine_says_what_it_reaches(served: Running, page: Any) -> None:
    assert ask(served.url, 40).status_code == 200
    with page.expect_response("**/ui/machine") as answered:
        page.click("#tab-machine")
    assert answered.value.json() == {"read": None}
    page.wait_for_function("window.quire.figures && window.quire.figures.reached > 0")
    assert "not measured here" in page.inner_text("#roofline-text") and page.is_hidden("#roofline")
    page.evaluate("window.quire.rates_read = [[1, 9e30], [2 ** 40, 5e12]]")
    assert ask(served.url, 9).status_code == 200
    page.wait_for_function("window.quire.figures.roof === 5e12")
    assert "5000.0 GB/s (" in page.inner_text("#roofline-text") and page.is_visible("#roofline")


def test_the_playground_asks_two_settings_and_shows_their_tokens(served: Running, page: Any) -> None:
    page.click("#tab-playground")
    page.check("#twice")
    for name in ("a", "b"):
        page.fill(f"#maxTokens-{name}", "6")
        page.fill(f"#temperature-{name}", "0")
    page.fill("#question", "hello")
    page.press("#question", "Enter")
    page.wait_for_function("window.quire.said.size === 2")
    page.wait_for_function("[...window.quire.said.values()].every((one) => one.length >= 1)")
    names = page.evaluate("[...window.quire.said.keys()]")
    page.wait_for_function("window.quire.ended.length > 0 && window.quire.requests.size === 0")
    page.click(f"#requests button:has-text('{names[0]}')")
    page.wait_for_selector("#request .token")
    assert "%" in page.get_attribute("#request .token", "title")
    page.wait_for_selector("#request meter", state="attached")
    page.fill("#schema-a", '{"type": "object"}')
    page.click("#export-curl")
    assert "curl http://127.0.0.1" in page.inner_text("#exported") and '"json_schema"' in page.inner_text("#exported")
    page.click("#export-python")
    compile(page.inner_text("#exported"), "exported", "exec")


def test_top_shows_the_same_in_text(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(served.url).status_code == 200
    assert main(["top", served.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 64 held" in shown and "16 tokens each" in shown
    assert main(["top", "--url", served.url.removeprefix("http://"), "--once"]) == 0
    assert "0 of 64 held" in capsys.readouterr().out
    assert main(["top", served.url, "--every", "0"]) == 2
    assert "every must be between" in capsys.readouterr().err
    assert main(["top", served.url, "--url", served.url]) == 2
    assert "twice" in capsys.readouterr().err


def test_the_interrupt_key_ends_top_well(
    served: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.cli.top.time.sleep", interrupt)
    assert main(["top", served.url]) == 0
    assert "interrupted" not in capsys.readouterr().err


def test_top_fits_its_window(served: Running) -> None:
    frame = httpx.get(served.url + "/ui/frame").json()
    one = {"state": "decode", "reason": "", "num_prompt": 9, "num_output": 2, "blocks": [1, 2], "name": "x" * 200}
    frame["requests"] = [{**one, "index": number} for number in range(50)]
    shown = lines(frame, 80, 24)
    assert len(shown) == 23 and shown[-1] == "... and 34 more" and all(len(line) <= 80 for line in shown[2:])
