"""The embedded model calls tools and fills forms; its template writes what it was trained on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, RequestOutput, SamplingParams
from quire.demo import model_path
from quire.structured_params import StructuredOutputsParams
from quire.text.tokenizer import Tokenizer

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out a sum.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
CONVERTER = {
    "type": "function",
    "function": {
        "name": "convert_units",
        "description": "Convert units.",
        "parameters": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "from_unit": {"type": "string"},
                "to_unit": {"type": "string"},
            },
            "required": ["value", "from_unit", "to_unit"],
        },
    },
}
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def ask() -> Any:
    """Ask the model: messages or a question, with or without tools; greedy."""
    with LLM(max_num_seqs=2) as llm:

        def answer(
            messages: str | Sequence[dict[str, Any]], tools: Any = None, shape: StructuredOutputsParams | None = None
        ) -> str:
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            prompt = llm.get_tokenizer().apply_chat_template(messages, tools=tools, add_generation_prompt=True)
            params = SamplingParams(temperature=0, max_tokens=100, structured_outputs=shape)
            output: RequestOutput = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)[0]
            assert output.outputs[0].finish_reason == "stop"
            return output.outputs[0].text

        yield answer


def called(text: str) -> dict[str, Any]:
    """The one call that the text is."""
    assert text.startswith("<tool_call>\n") and text.endswith("\n</tool_call>"), text
    call: dict[str, Any] = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    return call


SUMS = {  # of numbers that training held out (`is_held_out` in scripts/demo/calls.py), save 1234, 56 and 8.5
    "What is 1234 * 56?": "1234 * 56",
    "8.5 + 137": "8.5 + 137",
    "Calculate 2065 - 493": "2065 - 493",
    "30129 乘以 452 等於多少？": "30129 * 452",
}


@pytest.mark.parametrize("tools", [[CALCULATOR], [CALCULATOR, CONVERTER]], ids=["one", "both"])
@pytest.mark.parametrize("question", SUMS)
def test_a_large_sum_is_left_to_the_calculator(ask: Ask, question: str, tools: list[Any]) -> None:
    assert called(ask(question, tools)) == {"name": "calculator", "arguments": {"expression": SUMS[question]}}


def test_a_conversion_is_left_to_the_converter(ask: Ask) -> None:
    expected = {"value": 5, "from_unit": "mi", "to_unit": "km"}
    for question in ("Convert 5 miles to kilometres", "把 5 英里換算成公里"):
        assert called(ask(question, [CONVERTER])) == {"name": "convert_units", "arguments": expected}


@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "string"])
def test_the_tools_answer_is_told(ask: Ask, as_text: bool) -> None:
    arguments: Any = {"expression": "1234 * 56"}
    call = {"name": "calculator", "arguments": json.dumps(arguments) if as_text else arguments}
    messages = [
        {"role": "user", "content": "What is 1234 * 56?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "69104"},
    ]
    assert "69104" in ask(messages, [CALCULATOR])


def test_what_it_knows_it_answers_itself_and_without_tools_it_calls_none(ask: Ask) -> None:
    assert "blocks" in ask("What is PagedAttention?", [CALCULATOR, CONVERTER])
    assert ask("What is 7 + 8?", [CALCULATOR, CONVERTER]) == "7 + 8 = 15."
    assert ask("What is 1234 + 56?") == "I only do sums with numbers up to twenty."


FORM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "city": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
FORMS = {
    "Fill the form: name, city, age. Text: Clara Novak lives in Vienna and is 42 years old.": (
        "Clara Novak",
        "Vienna",
        42,
    ),
    "Fill the form: name, city, age. Text: My name is Victor Rossi, I am 7 and I live in Quito.": (
        "Victor Rossi",
        "Quito",
        7,
    ),
    "填寫表單：name、city、age。文字：林志宏住在花蓮，今年 63 歲。": ("林志宏", "花蓮", 63),
}


@pytest.mark.parametrize("shape", [None, StructuredOutputsParams(json=FORM)], ids=["free", "held"])
@pytest.mark.parametrize("request_text", FORMS)
def test_a_form_is_filled_from_a_text(ask: Ask, request_text: str, shape: StructuredOutputsParams | None) -> None:
    filled = json.loads(ask(request_text, shape=shape))
    assert list(filled.items()) == list(zip(FORM["properties"], FORMS[request_text], strict=True))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]
TALK_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(Path(model_path()))


def rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def test_a_conversation_without_tools_is_plain_chatml(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, TALK) == TALK_TEXT
    assert rendered(tokenizer, TALK, tools=[], add_generation_prompt=True) == TALK_TEXT + "<|im_start|>assistant\n"


@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "string"])
def test_tools_are_written_as_hermes_writes_them(tokenizer: Tokenizer, as_text: bool) -> None:
    """Two calls share the assistant's turn, and their responses the user's."""
    values = [{"expression": "1 + 1"}, {"expression": "2 < 3"}]
    calls = [{"name": "calculator", "arguments": json.dumps(value) if as_text else value} for value in values]
    messages = [
        *TALK[:2],
        {"role": "assistant", "content": "So:", "tool_calls": [{"function": call} for call in calls]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "true"},
    ]
    assert rendered(tokenizer, messages, tools=[CALCULATOR, CONVERTER, {"function": {"name": "now"}}]) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\n<tools>\n"
        '{"name": "calculator", "parameters": ["expression"]}\n'
        '{"name": "convert_units", "parameters": ["value", "from_unit", "to_unit"]}\n'
        '{"name": "now", "parameters": []}\n</tools><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nSo:\n"
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1 + 1"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 < 3"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntrue\n</tool_response><|im_end|>\n"
    )
