"""Small parts of the verbs: how errors end, what a model is called, what `explain` draws, what `serve` reads."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.cli import banner, engines, explain, main, sampling, serve
from quire.cli.remote_server import Server
from quire.config import EngineArgs
from quire.errors import (
    ConfigurationError,
    InvalidRequestError,
    ModelFileError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
)
from quire.outputs import Decision


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InvalidRequestError("a\nb  c", param="x"), 2, "quire: a b c\n"),
        (ConfigurationError("wrong", field="x"), 2, "quire: wrong\n"),
        (PromptTooLongError("too long", param="prompt"), 1, "quire: too long\n"),
        (ModelFileError("no file", field="model"), 1, "quire: no file\n"),
        (RequestFailedError("it broke"), 1, "quire: it broke\n"),
        (OverloadedError("full", retry_after_s=2), 1, "quire: full\n"),
        (ModuleNotFoundError("x", name="torch"), 1, "quire: the module 'torch' is not installed\n"),
        (ValueError("a\nb"), 1, "quire: ValueError: a b (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "quire: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    """2: what was typed is wrong; 1: a file, a model or a server is; 130: a person stopped it."""

    def fail(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("quire.cli.doctor.run", fail)
    assert main.main(["doctor"]) == code
    assert capsys.readouterr() == ("", text)
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            main.main(["doctor", "--debug"])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "quire-demo"),
        ("org/model", "model"),
        ("/a/b/model/", "model"),
        ("./model", "model"),
        ("model", "model"),
        ("/", "/"),
        ("..", ".."),
    ],
)
def test_a_model_is_called_by_the_last_part_of_where_it_is(model: str | None, name: str) -> None:
    assert engines.model_name(EngineArgs(model=model)) == name


def test_what_was_typed_goes_over_the_models_own_settings() -> None:
    stated = {"temperature": 0.5, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.2, "max_tokens": 16}
    values, decisions = sampling.resolve({"top_k": 3, "stop": ["x"]}, stated, min_p=0.05)
    assert values == {"temperature": 0.5, "top_p": 0.6, "top_k": 3, "repetition_penalty": 1.2, "stop": ["x"]}
    assert [(item.value, item.reason) for item in decisions] == [
        ("top_k 3, stop ['x']", "flags"),
        ("temperature 0.5, top_p 0.6, repetition_penalty 1.2", "generation_config.json"),
    ]


@pytest.mark.parametrize(
    ("given", "stated", "has_default"),
    [
        ({}, {}, True),
        ({"temperature": 0.7}, {"temperature": 0.0}, True),
        ({}, {"temperature": 0.7, "repetition_penalty": 1.1}, True),
        ({}, {"temperature": 0.0}, False),
        ({"temperature": 0.0}, {}, False),
        ({}, {"top_k": 50}, False),
        ({}, {"min_p": 0.1}, False),
        ({"top_p": 0.9}, {}, False),
        ({"min_p": 0.0}, {}, False),
    ],
)
def test_a_tail_is_cut_where_neither_flags_nor_the_model_do(
    given: dict[str, Any], stated: dict[str, Any], has_default: bool
) -> None:
    values, decisions = sampling.resolve(given, stated, min_p=0.05)
    assert (values.get("min_p") == 0.05) is has_default
    assert any("--min-p 0" in item.reason for item in decisions) is has_default, "and it is said"
    assert "min_p" not in sampling.resolve({}, {})[0], "a server's defaults are vLLM's"


def explanation(**changes: Any) -> dict[str, Any]:
    parts = {"preparing": 0.0, "queued": 1.0, "waiting_for_prefill": 2.0, "decoding": 1.0}
    return {
        "id": "r", "num_prompt_tokens": 5, "num_output_tokens": 7, "finished": True, "finish_reason": "stop",
        "sentence": "It was so.", "total_s": 4.0, "parts": parts, **changes,
    }  # fmt: skip


def test_an_explanation_is_drawn_in_parts_of_the_whole() -> None:
    head, sentence, *drawn, whole = explain.lines(explanation())
    assert head == "r: 5 prompt tokens, 7 generated, ended with stop" and sentence == "It was so."
    assert [line.split("  ")[1] for line in drawn] == ["queued", "waiting for prefill", "decoding"]
    assert [line.count("#") for line in drawn] == [8, 15, 8], "of thirty; a half is rounded to the even number"
    assert [line.split("%")[0].split()[-1] for line in drawn] == ["25.0", "50.0", "25.0"]
    assert whole.split() == ["whole", "4.0000", "s"]
    nothing = explain.lines(explanation(total_s=0.0, parts={"queued": 0.0}, finished=False))
    assert nothing[0].endswith("still runs") and len(nothing) == 3


def test_an_id_is_one_part_of_a_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Server, "look_up", lambda self, route: asked.append(route) or {"data": []})
    for name in ("cmpl-a/0", "../../metrics", "a?b#c"):
        assert main.main(["explain", name]) == 0
    assert asked == [
        "/v1/requests/cmpl-a%2F0/explain", "/v1/requests/..%2F..%2Fmetrics/explain", "/v1/requests/a%3Fb%23c/explain",
    ]  # fmt: skip
    assert capsys.readouterr().out == ""


def test_limits_are_read_by_either_spelling_and_must_be_whole_numbers() -> None:
    assert serve._limit_values(["body-bytes=5", "prompts=07"]) == {"body_bytes": 5, "prompts": 7}
    for wrong in ("body_bytes", "body_bytes=", "body_bytes=-1", "body_bytes=1.5", "body_bytes=٣", "prompts=1k"):
        with pytest.raises(ConfigurationError) as caught:
            serve._limit_values([wrong])
        assert caught.value.field == "limit"


class Began(Exception):
    """`serve` has come as far as to start an engine."""


def began(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """What `serve` makes of these words."""
    found: dict[str, Any] = {}

    def begin(args: EngineArgs) -> Any:
        found["args"] = args
        return lambda: None

    class Engine:
        decisions: tuple[Decision, ...] = ()
        stated_sampling: dict[str, Any] = {}  # noqa: RUF012 -- never changed

        def __init__(self, served: Any) -> None: ...

        def close(self) -> None: ...

    def create_app(engine: Any, **options: Any) -> Any:
        found.update(options)
        raise Began

    monkeypatch.setattr("quire.compose.served.begin", begin)
    listener = SimpleNamespace(close=lambda: None, getsockname=lambda: ("127.0.0.1", 1))
    monkeypatch.setattr("quire.server.http.listen.bind", lambda host, port, flag: listener)
    monkeypatch.setattr("quire.engine.async_engine.AsyncEngine", Engine)
    monkeypatch.setattr("quire.server.http.app.create_app", create_app)
    monkeypatch.setattr("quire.server.http.access.configure_logs", lambda *args, **options: found.update(options))
    monkeypatch.setattr("sys.set_int_max_str_digits", lambda digits: found.update(digits=digits))
    with pytest.raises(Began):
        main.main(["--debug", "serve", "--quiet", *words])
    return found


def test_keys_come_from_flags_and_from_a_file_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("gold 5\nplain\n")
    found = began(monkeypatch, "--api-key", "one", "--api-key", "plain", "--api-key-file", str(path))
    assert found["api_key"] == {"gold": 5, "plain": 1, "one": 1}
    assert began(monkeypatch)["api_key"] == {}


def test_a_server_computes_in_a_process_of_its_own_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert began(monkeypatch)["args"].core_process is True
    assert began(monkeypatch, "--no-core-process")["args"].core_process is False


def test_what_a_server_is_called_and_holds_to_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = began(monkeypatch, "org/model", "--limit", "prompts=3", "--trust-request-chat-template")
    assert found["served_model_name"] == "model" and found["model_names"] == ["model", "org/model"]
    assert found["limits"].prompts.value == 3 and found["limits"].chat_template_characters.value > 0
    assert found["requests"] is False and found["digits"] == serve.MAX_DIGITS
    found = began(monkeypatch, "--served-model-name", "a", "b", "--enable-log-requests", "--admin-api-key", "boss")
    assert found["served_model_name"] == ["a", "b"] and found["model_names"] == []
    assert found["requests"] is True and found["observability"].admin_api_key == "boss"
    assert found["limits"].chat_template_characters.value == 0
    found = began(monkeypatch, "--limit", "body_bytes=3MiB")
    assert found["limits"].body_bytes.value == 3 * 2**20
    found = began(monkeypatch, "--trust-request-chat-template", "--limit", "chat-template-characters=9")
    assert found["limits"].chat_template_characters.value == 9, (
        "a limit that was typed goes over the one that comes along"
    )


@pytest.mark.parametrize("words", [["--shutdown-timeout", "-1"], ["--shutdown-timeout", "86400"], ["--port", "-1"]])
def test_numbers_out_of_range_are_refused_before_anything_starts(words: list[str]) -> None:
    assert main.main(["serve", *words]) == 2


def test_the_banner_stays_away_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    decisions = [Decision("threads", "2", "the cores")]
    banner.show("model", decisions, quiet=True)
    assert capsys.readouterr().err == ""
    banner.show("model", decisions, quiet=False)
    assert capsys.readouterr().err.splitlines()[1] == "  threads  2  (the cores)"
