"""Every format of calls, with one answer as a model would write it."""

from quire.text.parsers.answer import AnswerFormat
from quire.text.parsers.choose import choose

SPECIAL = {
    name: 300 + place
    for place, name in enumerate(
        (
            *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>"),
            *("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", "<start_function_call>"),
            *("<end_function_call>", "<escape>", "<|other|>"),
        )
    )
}
A, B = '{"city": "Paris", "days": 3}', '{"city": "a } \\" ] ü", "deep": {"list": [1, {"x": null}], "on": true}}'
SEPARATE = "Let me look."
ANSWERS = {
    "hermes": f'{SEPARATE}\n<tool_call>\n{{"name": "weather", "arguments": {A}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "other-2", "arguments": {B}}}\n</tool_call>',
    "llama3_json": f'{SEPARATE} {{"name": "weather", "parameters": {A}}}; {{"name": "other-2", "parameters": {B}}}',
    "json": f'{SEPARATE}\n{{"name": "weather", "arguments": {A}}}\n{{"name": "other-2", "arguments": {B}}}',
    "mistral": f'{SEPARATE}[TOOL_CALLS][{{"name": "weather", "arguments": {A}, "id": "abcdefghi"}}, '
    f'{{"name": "other-2", "arguments": {B}}}]',
    "mistral [ARGS]": f"{SEPARATE}[TOOL_CALLS]weather[ARGS]{A}[TOOL_CALLS]other-2[ARGS]{B}",
    "granite": f'{SEPARATE}<|tool_call|>[{{"name": "weather", "arguments": {A}}}, '
    f'{{"arguments": {B}, "name": "other-2"}}]',
    "phi4_mini": f'{SEPARATE}<|tool_call|>[{{"name": "weather", "arguments": {A}}}, '
    f'{{"name": "other-2", "arguments": {B}}}]'
    "<|/tool_call|>",
    "phi4_mini functools[": f'{SEPARATE} functools[{{"name": "weather", "arguments": {A}}}, '
    f'{{"name": "other-2", "arguments": {B}}}]',
    "granite-20b-fc": f'{SEPARATE}<function_call> {{"name": "weather", "arguments": {A}}}'
    f'<function_call> {{"name": "other-2", "arguments": {B}}}',
    "deepseek_v3": f"{SEPARATE}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather"
    f"\n```json\n{A}\n```"
    f"<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>other-2\n```json\n{B}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "deepseek_v31": f"{SEPARATE}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{A}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>other-2<｜tool▁sep｜>{B}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "qwen3_coder": f"{SEPARATE}\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=other-2>\n"
    '<parameter=city>\na } " ] ü\n</parameter>'
    '\n<parameter=deep>\n{"list": [1, {"x": null}], "on": true}\n</parameter>\n</function>\n</tool_call>',
    "llama4_pythonic": f"{SEPARATE}\n[weather(city='Paris', days=3), "
    'other-2(city="a } \\" ] ü", deep={"list": [1, {"x": None}], "on": True})]',
    "functiongemma": f"{SEPARATE}<start_function_call>call:weather{{city:<escape>Paris<escape>,days:3}}"
    '<end_function_call><start_function_call>call:other-2{city:<escape>a } " ] ü<escape>,'
    "deep:{list:[1,{x:null}],on:true}}<end_function_call>",
    "openai": f"<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary"
    f"<|message|>{SEPARATE}<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.weather <|constrain|>json<|message|>{A}<|call|>"
    f"<|start|>assistant to=functions.other-2<|channel|>commentary json<|message|>{B}",
}


def made(name: str, reasoning: str | None = "none") -> AnswerFormat:
    """The format of an answer."""
    name, _, template = name.partition(" ")
    return choose(template, SPECIAL, name, reasoning)
