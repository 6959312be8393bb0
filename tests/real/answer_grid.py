"""Real chat templates as the judge of the formats of answers: `python -m tests.real.answer_grid DIR ...`.

Each directory is as for `tokenizer_grid`. The template writes an assistant's turn with calls of tools; read back, the
same calls must be found, and the grammar must let every token of the turn through.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from quire.core.request import GrammarSpec
from quire.errors import InvalidRequestError
from quire.structured.compiler import GrammarCompiler, Vocabulary
from quire.structured.source import source_of
from quire.structured_params import StructuredOutputsParams
from quire.text.chat.template import ChatTemplates
from quire.text.parsers.choose import choose
from quire.text.parsers.events import Asked, CallArguments, CallStart, Content, Tool, joined
from quire.text.parsers.reader import whole
from quire.text.tokenizer import Tokenizer

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = (Tool("weather", PLACE), Tool("notes.add", {"type": "object"}))
CALLS: list[list[tuple[str, dict[str, Any]]]] = [
    [("weather", {"city": "Paris", "days": 3})],
    [
        ("weather", {"city": 'a "quoted" } ] <x> é 分頁\n'}),
        ("notes.add", {"deep": {"list": [1, None, True, {"x": "}"}]}}),
    ],
    [("notes.add", {})],
]

_TEMPLATES = ChatTemplates()
"""Ours, which the tests compare with transformers': that one takes away a content of None, which some ask for."""


def turn(template: str, content: str | None, calls: Any, as_text: bool) -> str | None:
    """What the template writes for an assistant's turn behind a prompt; None where it cannot."""
    listed = [
        {
            "id": f"abcdefgh{place}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False) if as_text else given},
        }
        for place, (name, given) in enumerate(calls)
    ]
    tools = [
        {"type": "function", "function": {"name": one.name, "description": "d", "parameters": dict(one.schema)}}
        for one in TOOLS
    ]
    user = [{"role": "user", "content": "x"}]
    answer = [{"role": "assistant", "content": content, "tool_calls": listed}]
    try:
        rest = {"tools": tools, "bos_token": "", "eos_token": ""}
        begun = _TEMPLATES.render(template, {"messages": user, "add_generation_prompt": True, **rest})
        ended = _TEMPLATES.render(template, {"messages": [*user, *answer], "add_generation_prompt": False, **rest})
    except InvalidRequestError:  # templates raise what they like
        return None
    if not ended.startswith(begun):
        return None
    text = ended[len(begun) :]
    return text if all(name in text for name, _ in calls) else None


def check(directory: Path) -> list[str]:
    """What differs for one tokenizer."""
    ours = Tokenizer.from_directory(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    fmt = choose(config["chat_template"], ours.special_tokens)
    print(f"{directory}: {fmt.reason}")
    eos = sorted(ours.special_token_ids)[:1] if ours.eos_token_id is None else [ours.eos_token_id]
    compiler = GrammarCompiler(
        lambda: Vocabulary(
            [ours.token_bytes(token_id) for token_id in range(ours.vocab_size)],
            sorted(ours.special_token_ids),
            eos,
            lambda text: ours.encode(text, add_special_tokens=False),
        )
    )
    differences, num_read = [], 0
    asked = Asked(TOOLS, may_reason=fmt.reasoning is not None)
    source = source_of(StructuredOutputsParams(structural_tag=fmt.structural_tag(asked)))
    for calls in CALLS:
        for content, as_text in ((None, False), ("", False), ("Let me look.", False), (None, True)):
            text = turn(config["chat_template"], content, calls, as_text)
            if text is None:
                continue
            tokens = ours.encode(text, add_special_tokens=False)
            marks = [name for name in ours.special_tokens if name not in fmt.special_tokens]
            shown = [token for token in tokens if ours.token_table.content(token) not in marks]
            read = b"".join(map(ours.token_bytes, shown)).decode()
            num_read += 1
            events = joined(whole(fmt.parser(asked), read))
            names = [one.name for one in events if isinstance(one, CallStart)]
            given = [json.loads(one.text) for one in events if isinstance(one, CallArguments)]
            said = "".join(one.text for one in events if isinstance(one, Content))
            if (names, given) != ([name for name, _ in calls], [one for _, one in calls]):
                differences.append(f"{read!r} is read as {events}")
            if said != (content if content and content in read else ""):
                differences.append(f"of {read!r} the content is {said!r}")
            if '"{' not in read:  # arguments as JSON in a string are read, and not what a model writes
                differences += held(compiler, source, ours, shown)
    print(f"  {num_read} turns, {len(differences)} differences")
    return differences


def held(compiler: GrammarCompiler, source: str, ours: Tokenizer, tokens: list[int]) -> list[str]:
    """Where the grammar does not let a turn through."""
    matcher = compiler.matcher("turn", GrammarSpec(source, 2**20))
    masks = np.zeros((1, -(-ours.vocab_size // 32)), np.uint32)
    for place, token in enumerate(tokens):
        compiler.fill_masks([matcher], masks)
        if not masks[0, token // 32] >> np.uint32(token % 32) & 1:
            before = "".join(map(ours.token_text, tokens[:place]))
            return [f"behind {before!r} the token {ours.token_text(token)!r} is not allowed"]
        matcher.consume(token)
    return []  # complete or not: a template may leave out what closes the last call


if __name__ == "__main__":
    found = [line for name in sys.argv[1:] for line in check(Path(name))]
    print(*found, sep="\n")
    sys.exit(bool(found))
