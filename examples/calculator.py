"""A tool in the library: the embedded model leaves large sums to a calculator, and reads what it answers.

    python examples/calculator.py "What is 1234 * 56?"

Its calls are always valid (`quire.engine.tools` holds them to their tools); that they are the right ones it learned.
"""

import json
import operator
import re
import sys
from collections.abc import Iterator
from typing import Any

from quire import LLM, SamplingParams
from quire.engine.tools import Asked, read_tools
from quire.text.parsers.events import CallArguments, CallEnd, CallStart

PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOLS = [{"type": "function", "function": {"name": "calculator", "strict": True, "parameters": PARAMETERS}}]
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def calculate(expression: str) -> str:
    """The value of two numbers with a sign between them."""
    found = re.fullmatch(r"\s*(-?[\d.]+)\s*([-+*/])\s*(-?[\d.]+)\s*", expression)
    return f"{SIGNS[found[2]](float(found[1]), float(found[3])):.10g}" if found else "no sum"


def calls_in(llm: LLM, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls in an answer."""
    assert llm.answer_format is not None
    parser, name, arguments = llm.answer_format.parser(Asked(read_tools(TOOLS)[1])), "", ""
    for event in [*parser.push(text), *parser.end()]:
        match event:
            case CallStart():
                name, arguments = event.name, ""
            case CallArguments():
                arguments += event.text
            case CallEnd():
                yield name, json.loads(arguments)


def main() -> None:
    """Ask, calculate what it calls for, and let it answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": " ".join(sys.argv[1:]) or "What is 1234 * 56?"}]
    params = SamplingParams(temperature=0, max_tokens=120)
    with LLM(max_num_seqs=1) as llm:
        for _ in range(3):
            text = llm.chat(messages, params, tools=TOOLS, use_tqdm=False)[0].outputs[0].text
            found = list(calls_in(llm, text))
            if not found:
                print(text)
                return
            for name, arguments in found:
                answer = calculate(arguments["expression"])
                print(f"{name}({arguments['expression']}) = {answer}")
                call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
                messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
                messages += [{"role": "tool", "tool_call_id": "1", "content": answer}]


if __name__ == "__main__":
    main()
