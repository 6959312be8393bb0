"""What the embedded model is to learn of tools and forms: its texts are those that the template gives, its calls are
right, and what it is measured on is not among them."""

import ast
import importlib
import json
import operator
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from quire.demo import model_path
from quire.text.tokenizer import Tokenizer
from scripts.house.tree import ROOT

MODULES = ("conversations", "knowledge", "packing", "tools", "train_tokenizer", "wording")
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
COUNT = 400


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """The modules of scripts/demo, which import one another by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts/demo"))
        yield {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module", params=["en", "zh"])
def knowledge(scripts: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return scripts["knowledge"].load_knowledge(request.param)


def messages_of(document: Any) -> list[dict[str, Any]]:
    """A training document as a client would send it."""
    messages: list[dict[str, Any]] = []
    before = document.system.partition("# Tools")[0].strip()
    if before:
        messages.append({"role": "system", "content": before})
    for turn in document.turns:
        result = turn.question.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
        messages.append({"role": "tool" if result != turn.question else "user", "content": result})
        if turn.answer.startswith("<tool_call>"):
            call = json.loads(turn.answer.splitlines()[1])
            messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def test_the_template_writes_what_is_trained(scripts: dict[str, Any], knowledge: Any) -> None:
    """In transformers, and in ours; arguments as a mapping, and as the text that OpenAI's API has."""
    theirs, ours = AutoTokenizer.from_pretrained(model_path()), Tokenizer.from_directory(model_path())
    packer = scripts["packing"].Packer(Backend.from_file(f"{model_path()}/tokenizer.json"), 1, 0.0)
    random, template = Random(2), scripts["train_tokenizer"].CHAT_TEMPLATE
    for _ in range(60):
        document = scripts["conversations"].tool_conversation(knowledge, random)
        listed = document.system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
        options: dict[str, Any] = {
            "tools": [json.loads(line) for line in listed],
            "chat_template": template,
            "tokenize": False,
        }
        messages = messages_of(document)
        expected = "".join(text for text, _ in packer._segments(document))
        assert theirs.apply_chat_template(messages, **options) == expected
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        assert ours.apply_chat_template(messages, **options) == expected


def test_without_tools_the_template_is_as_before(scripts: dict[str, Any]) -> None:
    theirs = AutoTokenizer.from_pretrained(model_path())
    template = scripts["train_tokenizer"].CHAT_TEMPLATE
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for messages in (turns, turns[1:], [*turns, {"role": "assistant", "content": "Hello!"}]):
        for prompt in (True, False):
            options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
            now = theirs.apply_chat_template(messages, chat_template=template, **options)
            assert now == theirs.apply_chat_template(messages, **options)


def value_of(expression: str) -> int:
    tree = ast.parse(expression, mode="eval").body
    assert isinstance(tree, ast.BinOp) and isinstance(tree.left, ast.Constant) and isinstance(tree.right, ast.Constant)
    result: int = SIGNS[type(tree.op)](tree.left.value, tree.right.value)
    return result


def test_calls_are_valid_and_right(scripts: dict[str, Any], knowledge: Any) -> None:
    tools, random = scripts["tools"], Random(3)
    for kind, make in ((tools.CALCULATOR, tools.calculation), (tools.CONVERTER, tools.conversion)):
        function = kind["function"]
        schema = {**function["parameters"], "additionalProperties": False}
        for _ in range(COUNT):
            use = make(knowledge, random)
            assert use.name == function["name"]
            jsonschema.validate(use.arguments, schema)
            assert use.result in use.answer
            if use.name == "calculator":
                assert str(value_of(use.arguments["expression"])) == use.result
            else:
                factor = tools.FACTORS[use.arguments["source"], use.arguments["target"]]
                assert float(use.result) == pytest.approx(use.arguments["value"] * factor, abs=0.005)
                assert str(use.arguments["value"]) in use.question


def test_units_agree_both_ways(scripts: dict[str, Any]) -> None:
    factors = scripts["tools"].FACTORS
    pairs = [pair for pair in factors if pair[::-1] in factors]
    assert len(pairs) >= 6
    for source, target in pairs:
        assert factors[source, target] * factors[target, source] == pytest.approx(1, abs=1e-5)


def test_forms_hold_what_was_said(scripts: dict[str, Any], knowledge: Any) -> None:
    random = Random(4)
    for _ in range(COUNT):
        turn = scripts["conversations"].form_turn(knowledge, random)
        table = json.loads(turn.answer)
        assert 2 <= len(table) <= 3
        assert [
            key for key, value in table.items() if key not in turn.question or str(value) not in turn.question
        ] == []


def test_held_out_wordings_are_never_trained(scripts: dict[str, Any], knowledge: Any) -> None:
    """Judged on the questions themselves, with everything that is filled in taken out."""
    talk, tools, random = knowledge.talk, scripts["tools"], Random(5)
    for table, names in (("tools", "convert"), ("form", "asks")):
        assert set(talk[table][names]).isdisjoint(talk[table][f"{names}_held_out"])
    trained = {tools.conversion(knowledge, random).question for _ in range(COUNT)}
    for wording in talk["tools"]["convert_held_out"]:
        held_out = tools.conversion(knowledge, Random(6), wording)
        assert held_out.question not in trained


def test_tools_are_part_of_the_stream(scripts: dict[str, Any]) -> None:
    """Of what is drawn: tools in a sixth, each with a call; forms among the others; and calls are never cut short."""
    drawn = list(islice(scripts["conversations"].documents(Random(7)), 2000))
    with_tools = [document for document in drawn if "<tools>" in document.system]
    assert 0.12 < len(with_tools) / len(drawn) < 0.23
    turns = [turn for document in with_tools for turn in document.turns]
    calls = [turn for turn in turns if turn.answer.startswith("<tool_call>")]
    assert len(calls) > 0.6 * len(with_tools)
    assert all(turn.whole for turn in calls)
    assert not any("<tool_call>" in turn.answer for document in drawn if not document.system for turn in document.turns)
    forms = [turn for document in drawn for turn in document.turns if turn.whole and turn.answer.startswith("{")]
    assert len(forms) > 30
