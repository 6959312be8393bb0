"""What is kept of a conversation: questions, answers, stopped answers, refusals and resets."""

import io
from typing import Any

import pytest

from quire.cli import chat
from quire.errors import InvalidRequestError, OverloadedError, QuireError, RequestFailedError

SYSTEM = {"role": "system", "content": "be short"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def converse(
    monkeypatch: pytest.MonkeyPatch, said: str, *answers: Any, system: str | None = None
) -> list[list[dict[str, str]]]:
    """The history that each answer was given to. An answer is its pieces; an exception among them ends it."""
    histories, left = [], list(answers)

    def answer(history: list[dict[str, str]], say: Any) -> None:
        histories.append([dict(item) for item in history])
        for piece in left.pop(0):
            if not isinstance(piece, str):
                raise piece
            say(piece)

    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat._converse(answer, system)
    assert not left
    return histories


def test_each_question_comes_with_all_that_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converse(monkeypatch, "hi\n  and you \n\nlast", ["he", "llo"], ["fine"], ["bye"], system="be short")
    first = [SYSTEM, user("hi")]
    second = [*first, assistant("hello"), user("and you")]
    assert found == [first, second, [*second, assistant("fine"), user("last")]]
    assert capsys.readouterr().out == "hello\nfine\nbye\n"


def test_a_reset_forgets_all_but_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = converse(monkeypatch, "hi\n/reset\nagain\n", ["one"], ["two"], system="be short")
    assert found[1] == [SYSTEM, user("again")]
    assert converse(monkeypatch, "hi\n/reset\nagain\n", ["one"], ["two"])[1] == [user("again")]


@pytest.mark.parametrize(
    "error",
    [InvalidRequestError("too long"), OverloadedError("full", retry_after_s=1), RequestFailedError("it broke")],
)
def test_a_refused_question_was_never_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: QuireError
) -> None:
    found = converse(monkeypatch, "hi\nbad\nnext\n", ["one"], ["half", error], ["two"])
    assert found[2] == [user("hi"), assistant("one"), user("next")]
    assert f"quire: {error} (/reset begins anew)" in capsys.readouterr().err


def test_a_stopped_answer_stays_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converse(monkeypatch, "hi\nnext\n", ["as far", KeyboardInterrupt()], ["two"])
    assert found[1] == [user("hi"), assistant("as far"), user("next")]
    assert "[stopped]" in capsys.readouterr().err


def test_words_with_a_slash_are_for_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converse(monkeypatch, "/help\n/nope\n/2 is a half\n/exit\nnever\n", ["one"])
    assert found == [[user("/2 is a half")]]
    shown = capsys.readouterr().err
    assert "/reset  forget the conversation" in shown and "/nope is not known" in shown


def test_what_is_nobodys_to_mend_here_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuireError, match="gone"):
        converse(monkeypatch, "hi\nnext\n", [QuireError("gone")])
