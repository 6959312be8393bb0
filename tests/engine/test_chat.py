"""Conversations: what is refused before the template sees it, and what it is given."""

import threading
from collections.abc import AsyncIterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from quire.engine.async_engine import AsyncEngine
from quire.engine.chat import MAX_MESSAGES, encode_chat
from quire.engine.inputs import InputProcessor, RequestLimits
from quire.errors import InvalidRequestError
from quire.text.chat.messages import RESERVED_NAMES
from quire.text.chat.template import ChatTemplates
from quire.text.tokenizer import Tokenizer
from tests.engine.scripted import Scripted
from tests.text.small_tokenizers import CHATML, byte_level, write_directory

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def served() -> AsyncIterator[AsyncEngine]:
    found = Scripted().beside_a_loop()
    yield found
    await found.shutdown()


class Template:
    """A tokenizer that keeps what its template was given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        self.given = {"messages": messages, **options}
        return [1, 2]


class Inputs:
    """Keeps the text that is measured."""

    measured = ""

    def check_text_size(self, text: str) -> None:
        self.measured += text

    def check_encoded(self, token_ids: Any, field: str) -> None:
        pass


def encode(messages: Any, **options: Any) -> tuple[Template, Inputs]:
    template, inputs = Template(), Inputs()
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
        *((HELLO, {"chat_template_kwargs": {name: []}}, "chat_template_kwargs") for name in sorted(RESERVED_NAMES)),
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
        "chat_template": "{{ x }}", "tools": None, "documents": documents, "add_special_tokens": True, "x": 1,
    }  # fmt: skip
    template, _ = encode(HELLO, add_generation_prompt=False, continue_final_message=True)
    assert (template.given["add_generation_prompt"], template.given["continue_final_message"]) == (False, True)
    assert len(encode(HELLO * MAX_MESSAGES)[0].given["messages"]) == MAX_MESSAGES


def test_every_text_is_measured_before_the_template_runs() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    _, inputs = encode(
        [*messages, {"role": "user", "content": "three"}], documents=[{"title": "four", "more": ["five"]}]
    )
    for word in ("one", "two", "three", "four", "five"):
        assert inputs.measured.count(word) == 1


def test_what_the_tokenizer_refuses_is_refused(tmp_path: Path) -> None:
    """The rules that it has are its own: a fake one has none."""
    with_template = Tokenizer.from_directory(write_directory(tmp_path / "with", byte_level(), chat_template=CHATML))
    without = Tokenizer.from_directory(write_directory(tmp_path / "without", byte_level()))
    inputs = InputProcessor(with_template, RequestLimits(64, 1000, (), seed=0, has_priorities=False))
    for tokenizer, options, param in (
        (with_template, {"continue_final_message": True}, "continue_final_message"),
        (without, {}, "messages"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            encode_chat(tokenizer, inputs, HELLO, **options)
        assert caught.value.param == param
    assert encode_chat(without, inputs, HELLO, chat_template=CHATML) == encode_chat(with_template, inputs, HELLO)


def test_each_parameter_of_a_conversation_is_reserved() -> None:
    parameters = signature(Tokenizer.apply_chat_template).parameters.values()
    assert {item.name for item in parameters if item.kind is not item.VAR_KEYWORD} == RESERVED_NAMES


async def test_a_template_is_rendered_beside_the_event_loop(
    served: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on while one takes its second."""
    threads, render = [], ChatTemplates.render

    def rendering(*arguments: Any) -> str:
        threads.append(threading.current_thread())
        return render(*arguments)

    monkeypatch.setattr(ChatTemplates, "render", rendering)
    tokenizer = Tokenizer.from_directory(
        write_directory(tmp_path, byte_level(), chat_template="{{ messages[0].role }}")
    )
    monkeypatch.setattr(served, "get_tokenizer", lambda: tokenizer)
    assert await served.encode_chat(HELLO) == tokenizer.encode("user", add_special_tokens=False)
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
