"""The examples run as they are, each in a process of its own, and say what README and the guide say of them."""

import json
import re
import subprocess
import sys

import pytest

from scripts.house.tree import ROOT

SHARED = re.compile(r"Of (\d+) prompt tokens (\d+) (?:were shared|came from the prefix cache)")
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def output_of(name: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    return {name: output_of(name) for name in EXAMPLES}


def test_all_are_known(shown: dict[str, str]) -> None:
    assert shown.keys() == {"calculator", "extract", "form", "offline", "router", "streaming", "tree_of_thoughts"}
    assert all(shown.values())


@pytest.mark.parametrize("name", ["extract", "form", "router", "tree_of_thoughts"])
def test_programs_say_what_was_shared(shown: dict[str, str], name: str) -> None:
    found = SHARED.search(shown[name])
    assert found is not None
    prompts, shared = map(int, found.groups())
    assert prompts / 3 < shared < prompts


def test_a_form_is_json_with_what_the_model_knows(shown: dict[str, str]) -> None:
    decoder, text, entries = json.JSONDecoder(), shown["form"], []
    while text.startswith("{"):
        entry, end = decoder.raw_decode(text)
        entries.append(entry)
        text = text[end:].lstrip()
    assert [entry["term"] for entry in entries] == ["TTFT", "PagedAttention", "Quantisation", "Continuous batching"]
    for entry in entries:
        assert entry["definition"].startswith(entry["term"])
        assert entry["about"][0] in ("latency", "memory", "throughput")
        assert entry["language"] in ("English", "Chinese")


def test_a_sum_is_left_to_the_calculator(shown: dict[str, str]) -> None:
    assert shown["calculator"] == "calculator(1234 * 56) = 69104\nThe answer is 69104.\n"


def test_a_tree_finds_the_right_chain(shown: dict[str, str]) -> None:
    assert "\n7 -> 15 -> 9 -> 14 -> 5\n" in shown["tree_of_thoughts"]


def test_an_extraction_keeps_what_agrees(shown: dict[str, str]) -> None:
    for term in ("TTFT", "KV cache"):
        assert f"term: {term!r}, try" in shown["extract"]


def test_a_router_finds_each_page(shown: dict[str, str]) -> None:
    pages = re.findall(r"^  (.+) \(", shown["router"], re.MULTILINE)
    assert [page.rpartition("/")[2] for page in pages] == [
        "attention.md",
        "quantized.md",
        "metrics.md",
        "ordering.md",
        "no page: this is about something else",
    ]
    assert [page for page in pages if page.startswith("docs/") and not (ROOT / page).is_file()] == []
