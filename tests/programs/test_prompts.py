"""What calls ask of a backend: prompts, template variables, and where options begin."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import quire
from quire import LLM
from quire.errors import InvalidRequestError, ProgramError
from quire.programs import Remote, State, assistant, gen, select, user
from quire.programs.backend import Answer, Prompt, Usage
from quire.programs.scoring import Likelihoods, Tree
from quire.programs.session import Session
from tests.programs.test_remote import Recorder, first, recording

THINK = "<think></think>"


class Written:
    """A backend whose tokens are characters, and whose template begins a turn that is continued with `THINK`."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    async def generate(self, prompt: Prompt, given: Mapping[str, Any], seed: int) -> Answer:
        self.prompts.append(prompt)
        return Answer("ok", "stop")

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        self.prompts.append(prompt)
        text = "|".join(f"{message['role']}:{message['content']}" for message in prompt.conversation()["messages"])
        if prompt.messages is not None and prompt.text:
            head, _, tail = text.rpartition("assistant:")
            text = f"{head}assistant:{THINK}{tail}"
        return tuple(map(ord, text))

    async def likelihoods(self, tree: Tree, usage: Usage) -> Likelihoods:
        return {(node, token): -float(token % 5) - 1 for node in tree for token in tree[node]}


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def state(written: Written) -> Iterator[State]:
    session = Session(written, {"enable_thinking": False})
    yield State(session, "0")
    session.close()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.mark.parametrize("begin", ["", "So: "])
def test_what_the_template_writes_into_a_turn_is_no_part_of_an_option(state: State, begin: str) -> None:
    """An empty reasoning, say, which a turn that is only begun does not have yet."""
    options = ["yes", "never"]
    state += user("Hi")
    state += assistant(begin, select("x", options))
    expected = {option: sum(-float(ord(sign) % 5) - 1 for sign in option) / len(option) for option in options}
    assert state.call("x").scores == pytest.approx(expected)


def test_variables_of_the_template_are_those_of_the_run(state: State, written: Written) -> None:
    state += user("Hi")
    state += assistant(gen("x"))
    forks = state.fork(2)
    for fork in forks:
        fork += user("And?")
        fork += assistant("Well, " + gen("y"))
    forks.join()
    found = [prompt.conversation() for prompt in written.prompts]
    assert [one["chat_template_kwargs"] for one in found] == [{"enable_thinking": False}] * 3
    assert [one["add_generation_prompt"] for one in found] == [True, False, False]
    assert [one["continue_final_message"] for one in found] == [False, True, True]
    assert found[1]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Well, "},
    ]


def test_variables_reach_an_engine_and_a_server(llm: LLM, recorder: Recorder) -> None:
    with pytest.raises(ProgramError, match=r"gen\('x'\): chat_template_kwargs may not set 'messages'"):
        first.run(llm, chat_template_kwargs={"messages": []})
    with pytest.raises(ProgramError, match="does not take 'chat_template_kwargs'"):
        first.run(recorder.url, chat_template_kwargs={"enable_thinking": False})
    server = Remote(recorder.url, fields=["chat_template_kwargs"])
    first.run_batch(server, [{}], chat_template_kwargs={"enable_thinking": False})
    assert recorder.bodies[0][1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_program_does_not_overrun_the_queue_of_its_own_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for callers that come from outside; it is there again afterwards."""
    monkeypatch.setattr("quire.programs.session.MOST_TRIES", 1)

    @quire.program
    def short(s: State, text: str) -> None:
        s += text + gen("x", max_tokens=2)

    with LLM(max_num_seqs=2, max_num_queued_reqs=0, max_num_queued_tokens=8) as llm:
        bound = llm._engine.queue
        states = short.run_batch(llm, [{"text": f"{number} pages of keys and values"} for number in range(24)])
        assert [state.error for state in states] == [None] * 24
        assert llm._engine.queue is bound


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number from 1 to 1024, got 0"),
        ({"concurrency": True}, "concurrency must be a whole number"),
        ({"seed": "1"}, "seed must be a whole number from"),
        ({"seed": 2**63}, "seed must be a whole number from"),
    ],
)
def test_how_programs_are_run_is_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        first.run("http://127.0.0.1:1", **options)
    with pytest.raises(InvalidRequestError, match=text):
        first.run_batch("http://127.0.0.1:1", [{}], **options)
