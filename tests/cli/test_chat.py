"""What is kept of a conversation: questions, answers, stopped answers, refusals, resets; and what each command does."""

import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from quire.cli.chat_file import MAX_FILE_BYTES
from quire.cli.chat_session import COMMANDS, Conversation, Timing
from quire.cli.chat_terminal import Pipe
from quire.cli.main import main
from quire.errors import InvalidRequestError, OverloadedError, QuireError, RequestFailedError

SYSTEM = {"role": "system", "content": "be short"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def converse(
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    *answers: Any,
    system: str | None = None,
    seen: Any = None,
    **values: Any,
) -> list[list[dict[str, str]]]:
    """The history that each answer was given to. An answer is its pieces; an exception among them ends it.

    Args:
        seen: a list that is given the sampling parameters of each answer.
    """
    histories, left = [], list(answers)

    def answer(history: list[dict[str, str]], given: Any, say: Any, _: bool) -> None:
        histories.append([dict(item) for item in history])
        if seen is not None:
            seen.append(dict(given))
        for piece in left.pop(0):
            if not isinstance(piece, str):
                raise piece
            say(piece, 1)

    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    Conversation(answer, Pipe(), system, values).run()
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
    assert f"quire: {error} (/retry asks again, /clear begins anew)" in capsys.readouterr().err


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
    assert all(f"/{name} " in shown for name in COMMANDS) and "/nope is not known" in shown


def test_what_is_nobodys_to_mend_here_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuireError, match="gone"):
        converse(monkeypatch, "hi\nnext\n", [QuireError("gone")])


def test_a_command_that_is_nearly_one_is_not_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converse(monkeypatch, "/sytem be short\n /system is a word\n/etc/hosts is a file\n", ["one"], ["two"])
    assert [one[-1] for one in found] == [user("/system is a word"), user("/etc/hosts is a file")]
    assert "did you mean /system?" in capsys.readouterr().err


def test_the_system_prompt_can_be_changed_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "/system\n1\n/system  be long\n2\n/system none\n3\n"
    found = converse(monkeypatch, said, ["a"], ["b"], ["c"], system="be short")
    assert [one[0]["content"] for one in found] == ["be short", "be long", "1"]
    assert capsys.readouterr().err.splitlines() == [f"system prompt: {one}" for one in ("be short", "be long", "none")]


def test_settings_hold_from_the_next_answer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    said = '1\n/set temperature 0\n/set stop END\n/set top-p 0.5\n2\n/set temperature none\n/set stop ["a", "b"]\n3\n'
    converse(monkeypatch, said, ["a"], ["b"], ["c"], seen=seen, temperature=0.7)
    assert seen == [
        {"temperature": 0.7},
        {"temperature": 0, "stop": "END", "top_p": 0.5},
        {"temperature": 0.7, "stop": ["a", "b"], "top_p": 0.5},
    ]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("temperature 100.5", "temperature must be in [0, 100], got 100.5"),
        ("top_k 1.5", "top_k must be a whole number, got 1.5"),
        ("top_p 0", "top_p must be in (0, 1], got 0"),
        ("seed x", "seed must be a value as in JSON, got 'x'"),
        ("max_tokens 0", "max_tokens must be between 1 and 2147483647, got 0"),
        ("min_tokens 9", "min_tokens must not exceed max_tokens (8), got 9"),
        ("ignore_eos 1", "ignore_eos must be true or false"),
        ("temprature 1", "unknown setting 'temprature'; did you mean 'temperature'?"),
        ("n 2", "unknown setting 'n'"),
        ("stats maybe", "stats must be on or off, got 'maybe'"),
        ("markdown on", "markdown needs a terminal and pip install 'quire[chat]'"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_limit_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, text: str
) -> None:
    seen: list[dict[str, Any]] = []
    converse(monkeypatch, f"/set {typed}\nhi\n", ["one"], seen=seen, max_tokens=8)
    assert seen == [{"max_tokens": 8}]
    assert capsys.readouterr().err.startswith(f"quire: {text}")


def test_set_shows_what_applies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    converse(monkeypatch, "/set top_k 3\n/set\n/set top_k\n", temperature=0.7)
    lines = capsys.readouterr().err.splitlines()
    assert {"temperature = 0.7", "top_k = 3", "stats = off"} <= {*lines}
    (rest,) = (line for line in lines if line.startswith("the server's own: "))
    assert "seed" in rest.split() and "top_k" not in rest.split()
    assert lines[-1] == "top_k = 3; /set top_k VALUE, or none for what it was"


def test_set_shows_the_defaults_that_apply_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/set\n/set seed\n"))
    assert main(["chat", "--quiet", "--top-k", "7"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert {"top_p = 1.0", "top_k = 7", "seed = none", "stop = none", "max_tokens = none"} <= {*lines}
    assert not any("server" in line for line in lines)


def test_retry_asks_the_last_question_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OverloadedError("full", retry_after_s=1)
    said = "/retry\n1\n2\n/retry\n/retry\n/retry\n3\n/retry\n/retry\n"
    found = converse(monkeypatch, said, ["a"], ["b"], ["z"], [error], ["c"], [error], ["d"], ["e"])
    assert "/retry: nothing was asked yet" in capsys.readouterr().err
    one, two = [user("1"), assistant("a")], [user("2"), assistant("c")]
    assert found[1:5] == [[*one, user("2")]] * 4
    assert found[5:] == [[*one, *two, user("3")]] * 3


def test_stats_are_said_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, "1\n/set stats on\n2\n", ["a", "b"], ["c", "d", "e"])
    shown = capsys.readouterr().err
    assert shown.startswith("[3 tokens, ") and "tokens/s; the first after 0.0" in shown and shown.count("[") == 1


def test_the_rate_is_of_the_tokens_after_the_first() -> None:
    here, there = Timing(1.0), Timing(1.0)
    for now_s, num in ((1.5, 2), (2.0, 1), (2.5, 3)):
        here.took("x", num, now_s)
        there.took("x", 0, now_s)
    there.took("", 6, 3.0)  # a server says it at the end
    assert here.shown() == "[6 tokens, 4.0 tokens/s; the first after 0.50 s]"
    assert there.shown() == "[6 tokens, 5.0 tokens/s; the first after 0.50 s]"
    assert Timing(1.0).shown() == "[no tokens were counted]"


def test_a_conversation_is_saved_and_goes_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, seen = tmp_path / "a talk.json", list[dict[str, Any]]()
    converse(monkeypatch, f"/set seed 3\nhi\n/save {path}\nmore\n/save {path}\n", ["ünd"], ["b"], system="be short")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [*tmp_path.iterdir()] == [path]
    found = converse(monkeypatch, f"other\n/load {path}\nnext\n", ["x"], ["y"], seen=seen, temperature=1.0)
    assert found[1] == [SYSTEM, user("hi"), assistant("ünd"), user("more"), assistant("b"), user("next")]
    assert seen == [{"temperature": 1.0}, {"temperature": 1.0, "seed": 3}]
    capsys.readouterr()
    converse(monkeypatch, f"/load {path}\n/show\n")
    assert capsys.readouterr().err.splitlines()[1:] == [
        "system prompt: be short", "settings: seed=3", "user: hi", "assistant: ünd", "user: more", "assistant: b",
    ]  # fmt: skip


GOOD: dict[str, Any] = {"quire_chat": 1, "system": None, "settings": {}, "messages": [user("a"), assistant("b")]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps(GOOD)[:-9], "is not JSON"),
        ("[1]", "quire_chat must be 1"),
        (json.dumps({**GOOD, "quire_chat": 2}), "quire_chat must be 1"),
        (json.dumps({**GOOD, "system": 1}), "system must be text or null"),
        (json.dumps({**GOOD, "settings": []}), "settings must be an object"),
        (json.dumps({**GOOD, "settings": {"n": 2}}), "unknown setting 'n'"),
        (json.dumps({**GOOD, "settings": {"top_p": 7}}), "top_p must be in (0, 1], got 7"),
        (json.dumps({**GOOD, "messages": [user("a")]}), "each with its answer"),
        (json.dumps({**GOOD, "messages": [user("a"), user("b")]}), "messages[1] must have the role 'assistant'"),
        (json.dumps({**GOOD, "messages": [{"role": "user"}, assistant("b")]}), "messages[0] must have the role 'user'"),
        (" " * (MAX_FILE_BYTES + 1), f"has more than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_a_damaged_file_is_refused_and_the_conversation_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, text: str
) -> None:
    path = tmp_path / "talk"
    path.write_text(content)
    found = converse(monkeypatch, f"hi\n/load {path}\nmore\n", ["one"], ["two"], system="be short")
    assert found[1] == [SYSTEM, user("hi"), assistant("one"), user("more")]
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text"),
    [("/save", "/save needs the name of a file"), ("/load", "/load needs the name of a file"),
     ("/load {}/none", "No such file"), ("/load {}", "Is a directory"), ("/save {}/none/talk", "No such file"),
     ("/save {}/other", "another kind of file"), ("/save {}", "another kind of file")],
)  # fmt: skip
def test_a_file_that_cannot_be_had_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, text: str
) -> None:
    (tmp_path / "other").write_text("mine")
    converse(monkeypatch, command.format(tmp_path) + "\n")
    assert text in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1
