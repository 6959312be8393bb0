"""`quire chat` and `quire generate` against a running server: the same answers, no model loaded, errors in one line."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.cli.main import main
from quire.cli.remote_server import Server
from quire.errors import InvalidRequestError, OverloadedError, RequestFailedError
from quire.llm import AsyncLLM
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start

SAMPLING = ["--max-tokens", "6", "--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(tiny), max_num_seqs=8), api_key=["first", "second"])
    yield instance
    instance.stop()
    instance.engine.close()


def quire(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_chat_holds_each_answer_to_a_shape(
    served: Running, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and with a server: every answer of the conversation is one of the texts."""
    words = ["chat", "--quiet", "--max-tokens", "8", "--temperature", "1.5", "--choice", "yes", "no", "--"]
    for source in ([str(tiny)], [*at(served)]):
        given = [*words, *source] if source == [str(tiny)] else [*words[:-1], *source]
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
        code, out, err = quire(capsys, *given)
        assert code == 0, err
        assert len(out.split()) == 3 and set(out.split()) <= {"yes", "no"}
    code, _, err = quire(capsys, "chat", "--whitespace-pattern", " ", "/nowhere")
    assert code == 2 and "--whitespace-pattern needs --json-schema" in err


def at(served: Running) -> list[str]:
    return ["--url", served.url + "/v1", "--api-key", "second"]


@pytest.mark.parametrize("extra", [[], ["--raw"], ["--json", "--raw"]])
def test_generate_says_what_it_says_at_home(
    served: Running, tiny: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    words = ["generate", "--quiet", *SAMPLING, *extra, "hello", "you"]
    here = quire(capsys, *words, "--model", tiny)
    there = quire(capsys, *words, *at(served))
    assert here == there
    assert there[0] == 0
    assert there[1]


def test_seed_and_n_are_the_requests_own(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "generate",
        "--quiet",
        "--json",
        "--n",
        "2",
        "--temperature",
        "1",
        "--max-tokens",
        "9",
        *at(served),
        "hello",
    ]
    first, again, other = (quire(capsys, *words, "--seed", seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len(json.loads(first[1])["outputs"]) == 2


def test_raw_goes_on_to_the_end_of_the_context(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--quiet", "--raw", "--json", "--ignore-eos", *at(served), "hello"]
    code, out, _ = quire(capsys, *words)
    answer = json.loads(out)
    assert (code, answer["outputs"][0]["finish_reason"]) == (0, "length")
    assert answer["prompt_tokens"] + answer["outputs"][0]["tokens"] == served.engine.max_model_len


def test_chat_keeps_the_conversation(
    served: Running, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "hi\nand you\n/reset\nagain\n/exit\n"
    words = ["chat", "--quiet", *SAMPLING, "--system-prompt", "be short"]
    results = []
    for place in (["--model", tiny], at(served)):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        results.append(quire(capsys, *words, *place))
    assert results[0] == results[1]
    assert len(results[1][1].splitlines()) >= 3


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--url", "ftp://x"], 2, "--url must be"),
        (["--url", "http://x:99999"], 2, "not an address"),
        (["--url", "http://user@x"], 2, "--url must be"),
        (["--url", ""], 2, "--url must be"),
        (["--url", "127.0.0.1:1"], 1, "no answer from 127.0.0.1:1: "),
        (["--api-key", "k"], 2, "--api-key needs --url"),
        (["--model-name", "m"], 2, "--model-name needs --url"),
        (["--url", "http://x", "--api-key", "k\n"], 2, "printable"),
        (["--url", "http://x", "--max-num-seqs", "3"], 2, "--max-num-seqs does not go with --url"),
        (["--url", "http://x", "--seed", "1", "--dtype", "float32"], 2, "--dtype does not go"),
        (["--url", "http://127.0.0.1:1"], 1, "no answer from 127.0.0.1:1: "),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str) -> None:
    for verb in (["chat"], ["generate", "hello"]):
        found, _, err = quire(capsys, *verb, *words)
        assert (found, text in err, err.count("\n")) == (code, True, 1), err


def test_refusals_are_the_servers_own_words(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        ([*at(served)[:2], "hello"], "needs an API key"),
        ([*at(served), "--model-name", "other", "hello"], "is not served here"),
        ([*at(served), "--max-tokens", "100000", "hello"], "max_tokens"),
    ):
        code, _, err = quire(capsys, "generate", *words)
        assert (code, text in err) == (2, True), err


ANSWERS: list[tuple[bytes, str]] = [
    (b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", "the server answered 503"),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 30\r\n\r\n" + b'{"error": {"message": "oops"}}', "oops"),
    (b"HTTP/1.1 200 OK\r\n\r\nnot json", "not JSON"),
    (b"HTTP/1.1 200 OK\r\n\r\n[]", "not an object"),
    (b'HTTP/1.1 200 OK\r\n\r\n{"data": []}', "names no model"),
    (b"gibberish\r\n\r\n", "no answer"),
    (b"", "no answer"),
]


@pytest.mark.parametrize(
    ("status", "field", "expected"),
    [
        (503, b"Retry-After: 7\r\n", (OverloadedError, 7)),
        (429, b"retry-after: 12\r\n", (OverloadedError, 12)),
        (503, b"", (OverloadedError, 1)),
        (503, b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n", (OverloadedError, 1)),
        (400, b"", (InvalidRequestError, None)),
        (404, b"", (InvalidRequestError, None)),
        (500, b"Retry-After: 7\r\n", (RequestFailedError, None)),
    ],
)
def test_a_refusal_is_the_error_that_it_would_be_here(status: int, field: bytes, expected: Any) -> None:
    body = b'{"error": {"message": "so it is"}}'
    head = b"HTTP/1.1 %d X\r\n%sContent-Length: %d\r\n\r\n" % (status, field, len(body))
    kind, retry_after_s = expected
    with _saying([head + body]) as url, pytest.raises(kind, match="so it is") as caught:
        Server(url, None).look_up("/v1/models")
    assert getattr(caught.value, "retry_after_s", None) == retry_after_s


@pytest.mark.parametrize(
    ("base", "path"),
    [("", "/v1/models"), ("/", "/v1/models"), ("/v1", "/v1/models"), ("/v1/", "/v1/models"), ("/p/v1/", "/p/v1/models"),
     ("/v1x", "/v1x/v1/models")],
)  # fmt: skip
def test_an_address_may_end_in_v1_or_not(base: str, path: str) -> None:
    saying = _saying([b'HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n{"data": [{"id": "one"}]}'])
    with saying as url:
        assert Server(url + base, "key").first_model() == "one"
    assert saying.heard[0].startswith(f"GET {path} HTTP/1.1\r\n".encode())
    assert b"Authorization: Bearer key\r\n" in saying.heard[0]


@pytest.mark.parametrize(("answer", "text"), ANSWERS)
def test_other_servers_answers(capsys: pytest.CaptureFixture[str], answer: bytes, text: str) -> None:
    with _saying([answer]) as url:
        code, _, err = quire(capsys, "generate", "--url", url, "hello")
    assert (code, text in err, err.count("\n")) == (1, True, 1), err


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (b'data: {"error": {"message": "the row broke"}}\n\n', "the row broke"),
        (b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', "before its end"),
        (b"data: nonsense\n\n", "not JSON"),
    ],
)
def test_a_stream_that_breaks_off(capsys: pytest.CaptureFixture[str], events: bytes, text: str) -> None:
    with _saying([b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events]) as url:
        code, _, err = quire(capsys, "generate", "--url", url, "--model-name", "m", "hello")
    assert (code, text in err) == (1, True), err


class _saying:
    """A server that gives these answers, one a connection, whatever was asked."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self.heard: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: Any) -> None:
        self._listener.close()
        self._thread.join(PATIENCE_S)

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                self.heard.append(connection.recv(65536))
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # closing with bytes unread would reset the connection
                    pass
