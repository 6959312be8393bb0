"""Programs over a URL: the same states as in this process, and requests as OpenAI's own client would send them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

import quire
from quire import LLM
from quire.errors import ConfigurationError, OverloadedError, ProgramError
from quire.programs import Remote, State, assistant, gen, select, user
from quire.programs.remote import CHAT, COMPLETIONS, STANDARD
from tests.programs.test_programs import QUESTIONS, facts, talk
from tests.server.conftest import Running

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@quire.program
def first(s: State, **given: Any) -> None:
    """One answer at the beginning of a turn, which every server can give."""
    s += user("What is TTFT?")
    s += assistant(gen("x", **{"max_tokens": 6, **given}))


@quire.program
def inside(s: State) -> None:
    """An answer that goes on from a turn that is begun."""
    s += user("What is TTFT?")
    s += assistant("Well, " + gen("x", max_tokens=6))


@quire.program
def text(s: State, **given: Any) -> None:
    """A text without roles."""
    s += "TTFT is" + gen("x", **{"max_tokens": 6, "temperature": 0.0, **given})


@quire.program
def chosen(s: State) -> dict[str, float]:
    """A choice whose options are beginnings of one another, after a text that ends in the middle of a token."""
    s += user("What is 7 + 8?")
    s += assistant("7 + 8 = 1", select("x", ["5", "5.", "4", "500"]))
    return s.call("x").scores


class Recorder:
    """A server that answers with texts of its own, keeps what it was sent, and takes what it is said to take."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, Any] = {
            "/v1/models": {"data": [{"id": "theirs"}]},
            CHAT: {"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}]},
            COMPLETIONS: {"choices": [{"text": "Yes.", "finish_reason": "stop"}]},
        }
        self.refusals: list[int] = []
        """Statuses of the next answers to POST, before those above."""
        self.url = ""
        self.location = ""
        """Where answers send the client on to."""

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None:
            self.bodies.append((path, body))
            if self.refusals:
                return self.refusals.pop(0), {"error": {"message": "not now"}}
        return (200, self.answers[path]) if path in self.answers else (404, {"error": {"message": "no such path"}})


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: dict[str, Any] | None) -> None:
            recorder.headers.append(dict(self.headers))
            status, answer = recorder.answer(self.path, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.send_header("Location", recorder.location)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    recorder.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield recorder
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_url_gives_what_an_llm_gives(llm: LLM, served: Running) -> None:
    inputs = [{"question": question} for question in QUESTIONS]
    far, here = (talk.run_batch(engine, inputs, seed=5) for engine in (f"{served.url}/v1", llm))
    assert [facts(state) for state in far] == [facts(state) for state in here]
    assert all((state.usage.cached_tokens or 0) > 0 for state in far)


def test_a_text_over_a_url_is_that_of_an_llm(llm: LLM, served: Running) -> None:
    assert facts(text.run(served.url)) == facts(text.run(llm))


def test_openais_client_gets_the_same_answer(served: Running) -> None:
    """The client's own request for the same conversation; the seed of the place is the one thing to pass on."""
    state = first.run(served.url)
    call = state.call("x")
    with served.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is TTFT?"}],
            max_tokens=6,
            seed=call.given["seed"],
        )
        begun = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is TTFT?"}, {"role": "assistant", "content": "Well, "}],
            max_tokens=6,
            extra_body={"continue_final_message": True, "add_generation_prompt": False},
        )
    assert answer.choices[0].message.content == call.text
    assert answer.choices[0].finish_reason == call.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        call.usage.prompt_tokens,
        call.usage.completion_tokens,
    )
    assert begun.choices[0].message.content == inside.run(served.url)["x"]


def test_likelihoods_are_the_same_by_either_way(llm: LLM, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that names tokens, and of one that has the log-probabilities of prompts alone (vLLM)."""
    here, far = chosen.run(llm).returned, chosen.run(served.url).returned
    plain = Remote(served.url)
    takes = plain.takes
    monkeypatch.setattr(plain, "takes", lambda route: takes(route) - {"logprob_token_ids"})
    assert max(here, key=here.__getitem__) == "5."
    assert far == pytest.approx(here, abs=1e-9)
    assert chosen.run(plain).returned == pytest.approx(here, abs=1e-9)


def test_a_server_of_openais_fields_alone_gets_no_others(recorder: Recorder) -> None:
    """The body is one that the official client's own types allow."""
    state = first.run(recorder.url, stop=[";"], temperature=0.5)
    assert state.messages()[1] == {"role": "assistant", "content": "Yes."}
    assert state.usage.cached_tokens is None, "it does not say"
    ((path, body),) = recorder.bodies
    assert path == CHAT
    assert body == {
        "model": "theirs",
        "messages": [{"role": "user", "content": "What is TTFT?"}],
        "max_tokens": 6,
        "stop": [";"],
        "temperature": 0.5,
        "seed": state.call("x").given["seed"],
    }
    assert body.keys() <= CompletionCreateParamsNonStreaming.__annotations__.keys() | _inherited()
    assert STANDARD[CHAT] <= CompletionCreateParamsNonStreaming.__annotations__.keys() | _inherited()


def _inherited() -> set[str]:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    return set(CompletionCreateParamsBase.__annotations__)


def test_a_schema_goes_by_openais_field(recorder: Recorder) -> None:
    first.run(recorder.url, json=SCHEMA)
    assert recorder.bodies[0][1]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (inside.run, ["gen('x')", "'continue_final_message'", CHAT]),
        (lambda url: first.run(url, regex="a+"), ["gen('x')", "no answer to regex", "'structured_outputs'"]),
        (lambda url: first.run(url, choices=["a"]), ["gen('x')", "no answer to choice"]),
        (lambda url: first.run(url, top_k=3), ["gen('x')", "'top_k'", CHAT]),
        (lambda url: text.run(url, min_p=0.1), ["gen('x')", "'min_p'", COMPLETIONS]),
        (lambda url: text.run(url, max_tokens=None), ["gen('x')", "max_tokens must be a number"]),
        (chosen.run, ["select('x')", "/tokenize"]),
    ],
)
def test_what_a_server_lacks_is_refused_by_name(recorder: Recorder, run: Any, words: list[str]) -> None:
    with pytest.raises(ProgramError) as caught:
        run(recorder.url)
    assert [word for word in words if word not in str(caught.value)] == []
    assert recorder.bodies == [], "nothing was asked"


def test_what_a_server_takes_without_saying_so_can_be_named(recorder: Recorder) -> None:
    fields = ["continue_final_message", "add_generation_prompt"]
    inside.run(Remote(recorder.url, model="mine", api_key="k1", fields=fields))
    body = recorder.bodies[0][1]
    assert (body["model"], body["continue_final_message"], body["add_generation_prompt"]) == ("mine", True, False)
    assert body["messages"][-1] == {"role": "assistant", "content": "Well, "}
    assert {headers.get("Authorization") for headers in recorder.headers} == {"Bearer k1"}


def test_a_full_queue_is_waited_for_and_not_for_ever(recorder: Recorder) -> None:
    recorder.refusals = [429, 503, 429]
    assert first.run(recorder.url)["x"] == "Yes."
    assert len(recorder.bodies) == 4
    recorder.refusals = [429] * 100
    with pytest.raises(ProgramError, match=r"gen\('x'\): not now") as caught:
        first.run(recorder.url)
    assert isinstance(caught.value.__cause__, OverloadedError)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"choices": []}, "no choices"),
        ({"choices": [{"message": None}]}, "no choices"),
        ([1], "is not an object"),
        (b"<html>", "is not JSON"),
    ],
)
def test_an_answer_that_is_none_is_said(recorder: Recorder, answer: Any, words: str) -> None:
    recorder.answers[CHAT] = answer
    with pytest.raises(ProgramError, match=words):
        first.run(recorder.url)


def test_a_servers_refusal_is_passed_on(served: Running, recorder: Recorder) -> None:
    with pytest.raises(ProgramError, match=r"gen\('x'\): This model's maximum context length") as caught:
        first.run(served.url, max_tokens=5000)
    assert type(caught.value.__cause__).__name__ == "InvalidRequestError"
    recorder.refusals = [500]
    with pytest.raises(ProgramError, match=r"gen\('x'\): not now"):
        first.run(recorder.url)
    recorder.answers["/v1/models"] = {"data": []}
    with pytest.raises(ProgramError, match=r"gen\('x'\): the server names no model"):
        first.run(recorder.url)


def test_a_redirect_does_not_take_the_key_along(recorder: Recorder) -> None:
    with recording() as other:
        recorder.refusals, recorder.location = [302], f"{other.url}/elsewhere"
        with pytest.raises(ProgramError, match="no such path"):
            first.run(Remote(recorder.url, model="mine", api_key="k1"))
    assert {headers.get("Authorization") for headers in recorder.headers} == {"Bearer k1"}
    assert [headers.get("Authorization") for headers in other.headers] == [None]


def test_no_server_is_an_error() -> None:
    with recording() as gone:
        url = gone.url
    with pytest.raises(ProgramError, match=r"gen\('x'\): no answer from 127.0.0.1"):
        first.run(url)
    for wrong in ("127.0.0.1:8000", "ftp://a", "http://", "http://u:p@a"):
        with pytest.raises(ConfigurationError, match="a server's address is"):
            Remote(wrong)


def test_a_batch_over_a_url_is_open_at_once(recorder: Recorder) -> None:
    """Every request of four programs is there before the first is answered."""
    together, answered = threading.Barrier(4, timeout=60), recorder.answer

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if body is not None:
            together.wait()
        return answered(path, body)

    recorder.answer = answer  # type: ignore[method-assign]
    states = first.run_batch(recorder.url, [{}] * 4, concurrency=4)
    assert [state["x"] for state in states] == ["Yes."] * 4
    assert len(recorder.headers) == 6, "what is asked once was asked once: the description, and the models"


def test_the_clients_view_of_usage_is_ours(served: Running) -> None:
    """Every token that the client's own counting has, over the calls of a whole program."""
    state = talk.run(served.url, QUESTIONS[0])
    with served.client() as client:
        for call in state.calls:
            if call.finish_reason is None:
                continue
            answer = _repeated(client, call)
            ours = replace(call.usage, cached_tokens=0)
            assert answer.usage is not None
            assert (ours.prompt_tokens, ours.completion_tokens) == (
                answer.usage.prompt_tokens,
                answer.usage.completion_tokens,
            )
            assert answer.choices[0].message.content == call.text


def _repeated(client: openai.OpenAI, call: Any) -> Any:
    given = dict(call.given)
    shape = given.pop("structured_outputs", None)
    conversation = call.prompt.conversation()
    extra = {name: value for name, value in conversation.items() if name != "messages"}
    if shape is not None:
        extra["structured_outputs"] = {shape.kind: getattr(shape, shape.kind)}
    model = client.models.list().data[0].id
    return client.chat.completions.create(model=model, messages=conversation["messages"], extra_body=extra, **given)
