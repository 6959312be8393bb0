"""Makes the conversations in which the demo model calls a tool, and the small forms that it fills.

A call stands in the answer as the hermes format has it, `<tool_call>` around an object with `name` and `arguments`;
what the tool gave comes back in the user's turn. The system message lists the tools, as CHAT_TEMPLATE writes it.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from knowledge import Knowledge

LARGEST = 9999
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
MOST_FORM_FIELDS = 3


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """Return a tool as OpenAI's API describes one; all parameters are required."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


CALCULATOR = tool("calculator", "Compute an expression", expression="string")
CONVERTER = tool("convert", "Convert a value between units", value="number", source="string", target="string")
OTHERS = [
    tool("get_time", "Tell the time", city="string"),
    tool("search", "Search the documents", query="string"),
]
"""Never called: that a tool is there does not mean that it is asked."""
FACTORS = {
    ("km", "miles"): 0.621371,
    ("miles", "km"): 1.609344,
    ("m", "feet"): 3.28084,
    ("feet", "m"): 0.3048,
    ("kg", "pounds"): 2.204623,
    ("pounds", "kg"): 0.453592,
    ("litres", "gallons"): 0.264172,
    ("gallons", "litres"): 3.785412,
    ("hours", "minutes"): 60.0,
    ("minutes", "seconds"): 60.0,
}
TOOLS_BEFORE = "# Tools\n\nYou may call these functions:\n<tools>\n"
TOOLS_AFTER = (
    "\n</tools>\n\nCall a function like this:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class Use:
    """A question, the call that it wants, what the tool gives, and the answer then."""

    question: str
    name: str
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def call(self) -> str:
        """The call as the model writes it."""
        return written_call(self.name, self.arguments)

    @property
    def response(self) -> str:
        """The result as the template writes it."""
        return f"<tool_response>\n{self.result}\n</tool_response>"


def written_call(name: str, arguments: dict[str, Any]) -> str:
    """Return a call in the hermes format."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def tools_text(tools: list[dict[str, Any]]) -> str:
    """Return the system message that lists the tools, as CHAT_TEMPLATE writes it."""
    return TOOLS_BEFORE + "\n".join(json.dumps(one, ensure_ascii=False) for one in tools) + TOOLS_AFTER


def pick_tools(needed: dict[str, Any], random: Random) -> list[dict[str, Any]]:
    """Return the needed tool, in half of all cases with others, in any order."""
    tools = [needed]
    if random.random() < 0.5:
        tools.append(CONVERTER if needed is CALCULATOR else CALCULATOR)
    if random.random() < 0.1:
        tools.append(random.choice(OTHERS))
    random.shuffle(tools)
    return tools


def number(random: Random) -> int:
    """Return a number of one to four digits, each length alike."""
    return random.randrange(10 ** random.randint(1, 4))


def calculation(knowledge: Knowledge, random: Random, template: tuple[str, str] | None = None) -> Use:
    """Return a sum that the calculator does; `template` is its kind and its wording, drawn when there is none."""
    kind = template[0] if template else random.choice(list(SIGNS))
    wording = template[1] if template else random.choice(knowledge.talk["sums"][kind])
    a, b = number(random), number(random)
    sign = SIGNS[kind]
    result = a + b if kind == "plus" else a - b if kind == "minus" else a * b
    shown = "x" if kind == "times" else sign
    arguments = {"expression": f"{a} {sign} {b}"}
    return Use(wording.format(a=a, b=b), "calculator", arguments, str(result), f"{a} {shown} {b} = {result}.")


def conversion(knowledge: Knowledge, random: Random, template: str | None = None) -> Use:
    """Return a conversion between units; the wording is drawn when there is none."""
    tables = knowledge.talk["tools"]
    source, target = random.choice(list(FACTORS))
    value = number(random)
    result = f"{value * FACTORS[source, target]:.2f}".rstrip("0").rstrip(".")
    names = tables["units"]
    wording = template or random.choice(tables["convert"])
    question = wording.format(v=value, a=names[source], b=names[target])
    answer = tables["converted"].format(v=value, a=names[source], r=result, b=names[target])
    return Use(question, "convert", {"value": value, "source": source, "target": target}, result, answer)


def form(knowledge: Knowledge, random: Random, template: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the request to fill a form with what a sentence says, and the form."""
    tables = knowledge.talk["form"]
    about = {
        "name": random.choice(tables["names"]),
        "age": random.randint(1, 99),
        "city": random.choice(tables["cities"]),
        "job": random.choice(tables["jobs"]),
    }
    keys = random.sample(list(about), random.randint(2, MOST_FORM_FIELDS))
    said = random.sample(keys, len(keys))  # in an order of its own
    sentences = [tables["says"][key].format(x=about[key]) for key in said]
    gap = " " if knowledge.language == "en" else ""
    wording = template or random.choice(tables["asks"])
    return wording.format(keys=", ".join(keys), text=gap.join(sentences)), {key: about[key] for key in keys}
