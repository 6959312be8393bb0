"""Makes the demo model's tool calls: the tools as a client may spell them, sums and conversions to call for."""

import json
import math
import zlib
from functools import cache
from random import Random
from typing import Any

from knowledge import Knowledge, read_toml

Tool = dict[str, Any]
SIGNS = {"plus": "+", "minus": "-", "times": "*", "divided": "/"}
TOOLS = {
    "calculator": {"expression": "string"},
    "convert_units": {"value": "number", "from_unit": "string", "to_unit": "string"},
}
HELD_OUT_ONE_IN = 10  # of the numbers of at least three digits


@cache
def wording() -> dict[str, Any]:
    """Return the content of tools.toml."""
    return read_toml("tools.toml")


def is_held_out(number: str) -> bool:
    """Return whether the number is kept for the evaluation."""
    return len(number.replace(".", "")) > 2 and zlib.crc32(number.encode()) % HELD_OUT_ONE_IN == 0


def draw_number(random: Random, *, held_out: bool = False, digits: int = 5) -> str:
    """Return a number of one to `digits` digits, sometimes round, sometimes with a point inside."""
    while True:
        count = random.randint(3 if held_out else 1, digits)
        text = str(random.randint(10 ** (count - 1), 10**count - 1))
        if random.random() < 0.1:
            text = text[0] + "0" * (count - 1)
        if count > 1 and random.random() < 0.3:
            point = random.randint(max(1, count - 2), count - 1)
            text = f"{int(text[:point])}.{text[point:]}".rstrip("0").rstrip(".")
        if is_held_out(text) == held_out:
            return text


def shown(result: float) -> str:
    """Return a result as a tool gives it: at most four places after the point."""
    return f"{result:.4f}".rstrip("0").rstrip(".") if result % 1 else str(int(result))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """Return the call as the chat template writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def response_text(content: str) -> str:
    """Return a tool's response as the chat template writes it, without the turn's marks."""
    return f"<tool_response>\n{content}\n</tool_response>"


def tools_text(tools: list[Tool]) -> str:
    """Return the part of the system turn that names the tools, as the chat template writes it.

    Of each tool only its name and its parameters' names: the rest would be much to read for so small a model, and
    clients spell it in a thousand ways.
    """
    lines = ""
    for tool in tools:
        function = tool["function"]
        short = {"name": function["name"], "parameters": list(function["parameters"]["properties"])}
        lines += json.dumps(short, ensure_ascii=False) + "\n"
    return f"# Tools\n\n<tools>\n{lines}</tools>"


def tool(name: str) -> Tool:
    """Return the tool of this name as a client would send it."""
    properties = {parameter: {"type": kind} for parameter, kind in TOOLS[name].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def needs_tool(kind: str, first: str, second: str, largest_term: int, largest_factor: int) -> bool:
    """Return whether a sum is beyond what the model does by itself."""
    if kind == "divided" or "." in first + second:
        return True
    return max(int(first), int(second)) > (largest_factor if kind == "times" else largest_term)


def draw_sum(random: Random, *, held_out: bool = False) -> tuple[str, str, str]:
    """Return the kind of a sum and its two numbers."""
    kind = random.choice(list(SIGNS))
    digits = (4, 3) if kind == "times" else (5, 5)
    first, second = (draw_number(random, held_out=held_out, digits=count) for count in digits)
    return kind, first, second


def sum_question(kind: str, first: str, second: str, knowledge: Knowledge, random: Random) -> str:
    """Return a question for the sum."""
    templates = wording()[knowledge.language]["divided"] if kind == "divided" else knowledge.talk["sums"][kind]
    return str(random.choice(templates)).format(a=first, b=second)


def sum_result(kind: str, first: str, second: str) -> str:
    """Return what the calculator would answer."""
    a, b = float(first), float(second)
    results = {"plus": a + b, "minus": a - b, "times": a * b, "divided": a / b if b else math.inf}
    return shown(results[kind])


def draw_conversion(random: Random) -> tuple[str, str]:
    """Return the symbols of two units of one kind."""
    units = wording()["units"]
    source = random.choice(list(units))
    others = [name for name in units if units[name]["kind"] == units[source]["kind"] and name != source]
    return source, random.choice(others)


def converted(value: str, source: str, target: str) -> str:
    """Return what the converter would answer."""
    if source in "CF":
        celsius = float(value) * 9 / 5 + 32 if source == "C" else (float(value) - 32) * 5 / 9
        return shown(round(celsius, 2))
    units = wording()["units"]
    return shown(round(float(value) * units[source]["size"] / units[target]["size"], 4))


def conversion_question(value: str, pair: tuple[str, str], template: str, knowledge: Knowledge, random: Random) -> str:
    """Return a question for the conversion, with one of the names of each unit, mostly the first."""
    language = knowledge.language
    names = [wording()["units"][symbol][language] for symbol in pair]
    source, target = (name[0] if random.random() < 0.6 else random.choice(name) for name in names)
    space = " " if language == "en" or source.isascii() else random.choice((" ", ""))
    if source[0] == "°":
        space = ""
    return template.replace("{x}", f"{value}{space}{source}").replace("{y}", target)


def conversion_arguments(value: str, pair: tuple[str, str]) -> dict[str, Any]:
    """Return the arguments of the converter's call."""
    number = float(value) if "." in value else int(value)
    return {"value": number, "from_unit": pair[0], "to_unit": pair[1]}


def told(result: str, unit: str, language: str) -> str:
    """Return a tool's result in words, with its unit where it has one."""
    words = wording()
    name = words["units"][unit][language][0] if unit else ""
    return str(words[language]["told_result"]).replace("{r}", f"{result} {name}".strip())


def as_response(result: str, unit: str, random: Random) -> str:
    """Return the result as one of the texts that a client may send back."""
    as_json = f'{{"result": {result}}}'
    shapes = [result] * 8 + [as_json] * 2 + [as_json.replace("result", "value"), f"{result} {unit}".strip()]
    return random.choice(shapes)
