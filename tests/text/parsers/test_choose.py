"""Which format a template has. The lines are those by which real templates are known; `tests.real.answer_grid` runs
whole ones."""

import pytest

from quire.errors import InvalidRequestError
from quire.text.parsers.choose import REASONING_FORMATS, TOOL_FORMATS, choose
from quire.text.parsers.events import Tool


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ('{{- "<tool_call>\\n{\\"name\\": \\"" }}{% set content = x.split("</think>")[-1] %}', "hermes", "qwen3"),
        ("<tool_call>\\n<function=example>\\n<parameter=a>\\n", "qwen3_coder", "none"),
        ('{{ "<|python_tag|>" + x }}{{ "<|eot_id|>" }}', "llama3_json", "none"),
        ("{{- '\"parameters\": ' }}<|eot_id|>", "llama3_json", "none"),
        ("<|header_start|>[func_name1(param1=value1)]", "llama4_pythonic", "none"),
        ('{{- "[TOOL_CALLS][" }}', "mistral", "none"),
        ('{{- "[TOOL_CALLS]" + name + "[ARGS]" }}[THINK]', "mistral", "mistral"),
        ("<｜Assistant｜><｜tool▁sep｜>\n```json\n</think>", "deepseek_v3", "deepseek_r1"),
        ("<｜Assistant｜></think><｜tool▁sep｜>", "deepseek_v31", "deepseek_r1"),
        ("<|start_of_role|>assistant<|tool_call|>Here is my thought process:", "granite", "granite"),
        ("<|start_of_role|><think></think><response>", "json", "granite_think"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi4_mini", "none"),
        ('as functools[{"name": ...}]', "phi4_mini", "none"),
        ("<function_call> {}", "granite-20b-fc", "none"),
        ("<start_function_call>call:", "functiongemma", "none"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai", "openai_gptoss"),
        ("<|im_start|>", "json", "none"),
        (None, "json", "none"),
    ],
)
def test_the_format_is_seen_from_the_template(template: str | None, tools: str, reasoning: str) -> None:
    found = choose(template, {})
    assert (found.name, found.reasoning_name) == (tools, reasoning)
    assert found.reason.startswith(f"{tools}: the chat template") and "\n" not in found.reason


def test_a_name_that_is_given_is_taken() -> None:
    for name in TOOL_FORMATS:
        found = choose("<tool_call></think>", {}, tool_call_parser=name, reasoning_parser="none")
        assert (found.name, found.reasoning_name) == (name, "none") and "--tool-call-parser" in found.reason
    for name in REASONING_FORMATS:
        assert choose(None, {}, reasoning_parser=name).reasoning_name == name
    with pytest.raises(InvalidRequestError, match=r"tool_call_parser 'hermse'.*hermes"):
        choose(None, {}, tool_call_parser="hermse")
    with pytest.raises(InvalidRequestError, match=r"reasoning_parser 'qwen'.*qwen3"):
        choose(None, {}, reasoning_parser="qwen")


def test_a_marker_is_a_token_where_the_model_has_it_as_one() -> None:
    assert choose("[TOOL_CALLS]", {"[TOOL_CALLS]": 5}).special_tokens == ("[TOOL_CALLS]",)
    assert choose("[TOOL_CALLS]", {"</s>": 2}).special_tokens == ()


def test_a_model_whose_template_knows_no_tools_is_told_of_them() -> None:
    tool = Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}})
    assert choose("{{ tools }}<tool_call>", {}).tools_text((tool,), {}) is None
    text = choose("<|im_start|>", {}).tools_text((tool,), {"weather": "Says it."})
    assert text is not None and '"name": "weather", "description": "Says it.", "parameters": {"type"' in text
