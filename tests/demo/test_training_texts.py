"""The chat template of the demo model's script writes exactly the texts that the script trains on."""

import importlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from quire.demo import model_path
from quire.text.tokenizer import Tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts" / "demo"
MODULES = ("train_tokenizer", "conversations", "calls", "forms", "knowledge", "wording")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The script's modules, which import each other by bare names."""
    import sys

    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def messages_of(document: Any, tools: list[Any], calls: Any, *, as_text: bool) -> list[dict[str, Any]]:
    """The conversation as a client sends it."""
    system = document.system.removesuffix(calls.tools_text(tools)).removesuffix("\n\n") if tools else document.system
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in document.turns:
        is_response = turn.question.startswith("<tool_response>\n")
        asked = turn.question.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
        messages.append({"role": "tool" if is_response else "user", "content": asked})
        if turn.answer.startswith("<tool_call>"):
            call = json.loads(turn.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            call["arguments"] = json.dumps(call["arguments"]) if as_text else call["arguments"]
            messages.append({"role": "assistant", "content": None, "tool_calls": [{"function": call}]})
        else:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "string"])
def test_the_template_writes_what_is_trained(scripts: dict[str, Any], as_text: bool) -> None:
    calls, template = scripts["calls"], scripts["train_tokenizer"].CHAT_TEMPLATE
    tokenizer = Tokenizer.from_directory(Path(model_path()))
    seen = {"call": 0, "response": 0, "form": 0, "plain": 0}
    for document in islice(scripts["conversations"].documents(Random(5)), 400):
        if not document.turns:
            continue
        names = [json.loads(line)["name"] for line in document.system.splitlines() if line.startswith("{")]
        tools = [calls.tool(name) for name in names]
        messages = messages_of(document, tools, calls, as_text=as_text)
        trained = f"<|im_start|>system\n{document.system}<|im_end|>\n" if document.system else ""
        for turn in document.turns:
            trained += f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>\n"
            seen["call"] += turn.answer.startswith("<tool_call>")
            seen["response"] += turn.question.startswith("<tool_response>")
            seen["form"] += turn.answer.startswith('{"') and '"term"' not in turn.answer
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, chat_template=template)
        assert text == trained
        if not tools:  # the template of the weights that are there
            seen["plain"] += 1
            assert tokenizer.apply_chat_template(messages, tokenize=False) == trained
    assert min(seen.values()) > 20, seen


def test_results_of_the_tools_are_true(scripts: dict[str, Any]) -> None:
    """Against the measures as they are defined: 1 mi = 1.609344 km, 1 lb = 0.45359237 kg, 0 °C = 32 °F."""
    calls = scripts["calls"]
    assert [calls.converted(*case) for case in (("5", "mi", "km"), ("2.5", "lb", "kg"), ("-40", "F", "C"))] == [
        "8.0467",
        "1.134",
        "-40",
    ]
    assert [calls.sum_result(*case) for case in (("times", "1234", "56"), ("divided", "1", "8"))] == ["69104", "0.125"]


def test_what_is_held_out_is_never_trained(scripts: dict[str, Any]) -> None:
    calls, random = scripts["calls"], Random(2)
    assert not any(calls.is_held_out(calls.draw_number(random)) for _ in range(3000))
    assert all(calls.is_held_out(calls.draw_number(random, held_out=True)) for _ in range(300))
    known = scripts["knowledge"].load_knowledge("zh")
    kept = set(calls.wording()["zh"]["city_held_out"])
    assert not any(scripts["forms"].draw_person(known, random)[1] in kept for _ in range(3000))
