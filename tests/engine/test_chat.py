"""Conversations: what is refused before the template sees it, and what it is given."""

from typing import Any

import pytest

from quire.engine.chat import MAX_MESSAGES, encode_chat
from quire.errors import InvalidRequestError

HELLO = [{"role": "user", "content": "hello"}]


class Template:
    """A tokenizer that keeps what its template was given."""

    def __init__(self, *, has_template: bool = True) -> None:
        self.has_chat_template = has_template
        self.given: dict[str, Any] = {}

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        self.given = {"messages": messages, **options}
        return [1, 2]


class Inputs:
    """Keeps the text that is measured."""

    measured = ""

    def check_text_size(self, text: str) -> None:
        self.measured += text


def encode(messages: Any, *, has_template: bool = True, **options: Any) -> tuple[Template, Inputs]:
    template, inputs = Template(has_template=has_template), Inputs()
    assert encode_chat(template, inputs, messages, **options) == [1, 2]  # type: ignore[arg-type]
    return template, inputs


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        ("hello", {}, "messages"),
        (b"hello", {}, "messages"),
        ({"role": "user"}, {}, "messages"),
        (None, {}, "messages"),
        (["hello"], {}, "messages"),
        ([{"content": "x"}], {}, "messages"),
        ([{"role": 5}], {}, "messages"),
        ([{"role": ""}], {}, "messages"),
        ([{"role": "user<|end|>"}], {}, "messages"),
        ([{"role": "user\n"}], {}, "messages"),
        ([{"role": "x" * 65}], {}, "messages"),
        (HELLO * (MAX_MESSAGES + 1), {}, "messages"),
        (HELLO, {"continue_final_message": True}, "continue_final_message"),
        (HELLO, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        (HELLO, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (HELLO, {"has_template": False}, "messages"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode(messages, **options)
    assert caught.value.param == param


def test_what_is_one_reaches_the_template_whole() -> None:
    messages = [{"role": "user-1_x", "content": [{"type": "text", "text": "hello"}], "extra": 1}]
    documents = [{"title": "a"}]
    template, _ = encode(
        messages, documents=documents, chat_template="{{ x }}", chat_template_kwargs={"x": 1}, add_special_tokens=True
    )
    assert template.given == {
        "messages": messages, "tokenize": True, "add_generation_prompt": True, "continue_final_message": False,
        "chat_template": "{{ x }}", "documents": documents, "add_special_tokens": True, "x": 1,
    }  # fmt: skip
    template, _ = encode(HELLO, add_generation_prompt=False, continue_final_message=True)
    assert (template.given["add_generation_prompt"], template.given["continue_final_message"]) == (False, True)
    assert len(encode(HELLO * MAX_MESSAGES)[0].given["messages"]) == MAX_MESSAGES
    assert encode(HELLO, has_template=False, chat_template="{{ x }}")[0].given["chat_template"] == "{{ x }}"


def test_every_text_is_measured_before_the_template_runs() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    _, inputs = encode(
        [*messages, {"role": "user", "content": "three"}], documents=[{"title": "four", "more": ["five"]}]
    )
    for word in ("one", "two", "three", "four", "five"):
        assert inputs.measured.count(word) == 1
