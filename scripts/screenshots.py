"""The pictures of docs/guide/live.md: each view of `/ui`, of a server under load, as Chromium draws it.

    python -m scripts.screenshots [CHROMIUM]     writes docs/guide/live-*.png; needs playwright

The machine's rates are measured first where they are not known (`quire plan`), so that its view has a roof.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    *("--port", "0", "--quiet", "--max-num-seqs", "8", "--num-gpu-blocks-override", "90", "--max-model-len", "640"),
]
SIZE = {"width": 980, "height": 600}
PAUSE_MS = 2500


def ask(url: str, prompt: list[int], num_tokens: int) -> None:
    """One completion of a set length."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", data, headers)) as answer:
        answer.read()


def load(url: str, ends: threading.Event, seed: int) -> None:
    """One caller: prompts of which half begin alike, answers of very different lengths."""
    rng, shared = random.Random(seed), list(range(100, 164))
    while not ends.is_set():
        own = [rng.randrange(300) for _ in range(rng.randint(20, 120))]
        ask(url, [*(shared if rng.random() < 0.5 else []), *own], rng.choice([15, 30, 130]))


def shoot(url: str, chromium: str | None) -> None:
    """All views, while the load runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url + "/ui")
        ends = threading.Event()
        callers = [threading.Thread(target=load, args=(url, ends, seed)) for seed in range(10)]
        for caller in callers:
            caller.start()
        for view in ("blocks", "schedule", "machine"):
            page.click(f"#tab-{view}")
            page.wait_for_timeout(PAUSE_MS * (3 if view == "schedule" else 1))
            page.screenshot(path=ROOT / f"docs/guide/live-{view}.png", full_page=True)
        ends.set()
        for caller in callers:
            caller.join()
        playground(page)
        browser.close()


def playground(page: Any) -> None:
    """Two settings beside each other, and then the request that one of them was."""
    page.click("#tab-playground")
    page.check("#twice")
    page.fill("#temperature-a", "0")
    page.fill("#maxTokens-a", "60")
    page.fill("#maxTokens-b", "60")
    page.fill("#question", "What is PagedAttention?")
    page.press("#question", "Enter")
    page.wait_for_timeout(PAUSE_MS)
    page.click("#export-python")
    page.screenshot(path=ROOT / "docs/guide/live-playground.png")
    page.click("#tab-blocks")
    page.click("#requests button:has-text('chatcmpl')")
    page.wait_for_timeout(PAUSE_MS)
    page.locator("aside").screenshot(path=ROOT / "docs/guide/live-request.png")


def main() -> None:
    """Start a server, take the pictures, stop it."""
    chromium = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    quire = [sys.executable, "-m", "quire"]
    subprocess.run([*quire, "plan", ROOT / "src/quire/demo/model"], stdout=subprocess.DEVNULL, check=True)
    with subprocess.Popen([*quire, "serve", *WORDS], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            found = (re.search(r"ready on (http://[\d.:]+)", line) for line in server.stderr)
            shoot(next(one[1] for one in found if one), chromium)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
