"""Programs over an engine of this process: the results of their calls made one by one, whatever runs beside them."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import psutil
import pytest

import quire
from quire import LLM, AsyncLLM
from quire.errors import EngineDeadError, InvalidRequestError, ProgramError
from quire.programs import Call, State, assistant, gen, select, system, user
from tests.programs.conftest import asked_alone

QUESTIONS = ["What is the KV cache?", "What is TTFT?", "12 - 5 = ?", "Tell me a tiny story.", "What is quantisation?"]


@quire.program
def talk(s: State, question: str, temperature: float = 0.8) -> str:
    """Every kind of piece: two places in a turn, a choice, forks inside a turn and after it, a condition."""
    s += system("You are terse.")
    s += user(question)
    s += assistant(
        "Well: ", gen("answer", max_tokens=8, temperature=temperature), " Sure? ", gen("sure", choices=["y", "n"])
    )
    s += user("How many words?")
    with s.assistant():
        s += "I count "
        s += gen("count", regex="[0-9]{1,2}")
        s += " words" if int(s["count"]) != 1 else " word"
        forks = s.fork(2)
        for place in range(2):
            forks[place] += f", {place}: " + gen("more", max_tokens=4, temperature=1.0)
        s += forks.join()[1]["more"]
    s += user("Which?")
    s += assistant(select("which", ["a cache", "a queue", "a cache of keys"]))
    return s["which"]


def facts(state: State) -> list[Any]:
    """What must not depend on what else runs: all but the tokens that the cache supplied."""
    found = [replace(call, usage=replace(call.usage, cached_tokens=0)) for call in state.calls]
    return [state.text(), state.returned, found, replace(state.usage, cached_tokens=0)]


def test_a_batch_has_the_results_of_single_runs(llm: LLM) -> None:
    inputs = [{"question": question} for question in QUESTIONS * 2]
    batch = talk.run_batch(llm, inputs, seed=3)
    alone = [talk.run(llm, question, seed=3, concurrency=1) for question in QUESTIONS]
    assert [facts(state) for state in batch] == [facts(state) for state in alone] * 2
    assert len({state["answer"] for state in batch}) == len(QUESTIONS)


def test_each_call_is_the_same_asked_by_itself(llm: LLM) -> None:
    for state in talk.run_batch(llm, [{"question": question} for question in QUESTIONS]):
        asked = [call for call in state.calls if call.finish_reason is not None]
        assert [call.name for call in asked] == ["answer", "sure", "count"]
        assert [asked_alone(llm, call) for call in asked] == [call.text for call in asked]


def test_an_async_engine_gives_what_an_llm_gives(llm: LLM) -> None:
    async def main() -> list[State]:
        engine = AsyncLLM(max_num_seqs=4)
        try:
            batch = await talk.arun_batch(engine, [{"question": question} for question in QUESTIONS], concurrency=3)
            return [*batch, await talk.arun(engine, QUESTIONS[0])]
        finally:
            await engine.shutdown()

    expected = [talk.run(llm, question) for question in [*QUESTIONS, QUESTIONS[0]]]
    assert [facts(state) for state in asyncio.run(main())] == [facts(state) for state in expected]


def test_the_conversation_is_what_was_said(llm: LLM) -> None:
    state = talk.run(llm, QUESTIONS[0])
    answer, sure, count, which = (state[name] for name in ("answer", "sure", "count", "which"))
    assert state.messages()[:3] == [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": f"Well: {answer} Sure? {sure}"},
    ]
    assert state.messages()[4]["content"].startswith(f"I count {count} word")
    assert state.text().splitlines()[-1] == f"assistant: {which}"
    assert (sure in "yn", count.isdigit(), state.returned) == (True, True, which)


def test_the_seed_decides_and_forks_differ(llm: LLM) -> None:
    @quire.program
    def draws(s: State) -> list[str]:
        s += "Once" + gen("own", max_tokens=12, temperature=2.0)
        forks = s.fork(3)
        for fork in forks:
            fork += gen("tail", max_tokens=12, temperature=2.0)
        return [s["own"], *forks.values("tail")]

    first, again, other = (draws.run(llm, seed=seed).returned for seed in (1, 1, 2))
    assert first == again
    assert len({*first, *other}) == 8


def test_a_program_without_roles_is_a_text(llm: LLM) -> None:
    @quire.program
    def text(s: State) -> None:
        s += "The KV cache " + gen("is", max_tokens=6, temperature=0.0)
        s += "."

    state = text.run(llm)
    (alone,) = llm.generate("The KV cache ", quire.SamplingParams(max_tokens=6, temperature=0.0), use_tqdm=False)
    assert state.text() == f"The KV cache {alone.outputs[0].text}."


def test_forks_share_what_stands_before_them(llm: LLM) -> None:
    """Of a beginning of 500 tokens and more, each fork after the first takes all full blocks from the cache."""

    @quire.program
    def wide(s: State, text: str) -> Any:
        s += user(text * 60)
        with s.assistant():
            s += "So: " + gen("first", max_tokens=1)
            forks = s.fork(4)
            for fork in forks:
                fork += gen("next", max_tokens=1)
            return forks.join()

    state = wide.run(llm, "Pages of keys and values are shared. ")
    (first,), nexts = state.calls, [fork.call("next") for fork in state.returned]
    assert first.usage.prompt_tokens > 500
    for call in nexts:
        assert call.usage.cached_tokens is not None
        assert call.usage.cached_tokens >= first.usage.prompt_tokens - 32
    assert state.usage.cached_tokens == sum(call.usage.cached_tokens or 0 for call in [first, *nexts])
    assert state.usage.requests == 5


def test_one_failed_fork_loses_no_other(llm: LLM) -> None:
    @quire.program
    def forked(s: State, joins: bool) -> Any:
        s += user("Hi")
        with s.assistant():
            forks = s.fork(3)
            for place, fork in enumerate(forks):
                # No token of that number: the engine refuses the call, when it is made.
                fork += gen("x", max_tokens=3, allowed_token_ids=[10**6] if place == 1 else None)
                fork += " and " + gen("y", max_tokens=3)
            return forks.join() if joins else forks

    forks = forked.run(llm, joins=False).returned
    assert [fork.error is None for fork in forks] == [True, False, True]
    assert forks[0].text() == forks[2].text() == f"user: Hi\nassistant: {forks[0]['x']} and {forks[0]['y']}"
    with pytest.raises(ProgramError, match=r"gen\('x'\): allowed_token_ids must hold token ids") as caught:
        forks[1]["x"]
    assert caught.value.variable == "x"
    with pytest.raises(ProgramError, match=r"'y' was not filled: gen\('x'\): allowed_token_ids"):
        forks[1]["y"]
    with pytest.raises(ProgramError, match=r"fork 1: gen\('x'\): allowed_token_ids"):
        forked.run(llm, joins=True)


def test_one_failed_program_of_a_batch_loses_no_other(llm: LLM) -> None:
    @quire.program
    def short(s: State, word: str) -> int:
        s += user("Hi")
        s += assistant(gen("x", max_tokens=3))
        return len(s[word])

    good, wrong, unknown = short.run_batch(llm, [{"word": "x"}, {"word": "xx"}, {"wort": "x"}])
    assert good.error is None and good.returned == len(good["x"])
    assert "unknown variable 'xx'; did you mean 'x'?" in str(wrong.error)
    assert wrong["x"] == good["x"], "what was filled before stays"
    assert isinstance(unknown.error, TypeError)
    with pytest.raises(ProgramError, match="the program failed before 'x'"):
        unknown["x"]
    with pytest.raises(InvalidRequestError, match=r"inputs\[1\] must map names to values, got str"):
        short.run_batch(llm, [{"word": "x"}, "x"])  # type: ignore[list-item]


MISUSES: dict[str, Any] = {
    "'x' stands in the turn of user": lambda s: s.__iadd__(user(gen("x"))),
    "text outside of a turn": lambda s: s.__iadd__(user("a")).__iadd__("b"),
    "a turn of user inside a program without roles": lambda s: s.__iadd__("a").__iadd__(user("b")),
    "a program writes text, gen and select, not int": lambda s: s.__iadd__(3),
    "fork takes 1 to 1024 copies, got 0": lambda s: s.fork(0),
    "messages of a program without roles": lambda s: s.__iadd__("a").messages(),
    "unknown variable 'x'": lambda s: s["x"],
    "select('x'): some text must stand before the options": lambda s: s.__iadd__(select("x", ["a", "b"])),
}


@pytest.mark.parametrize("text", MISUSES)
def test_misuse_is_refused(llm: LLM, text: str) -> None:
    with pytest.raises((InvalidRequestError, ProgramError)) as caught:
        quire.program(lambda s: MISUSES[text](s)).run(llm)
    assert text in str(caught.value)


def test_an_open_turn_keeps_others_out(llm: LLM) -> None:
    @quire.program
    def nested(s: State) -> None:
        with s.assistant():
            s += user("Hi")

    with pytest.raises(InvalidRequestError, match="a turn of user inside the turn of assistant"):
        nested.run(llm)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: None, "needs a parameter for its state"),
        (lambda s, seed: None, "may not have a parameter 'seed'"),
        (asyncio.sleep, "a program is a plain function"),
    ],
)
def test_what_is_no_program_is_refused(function: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        quire.program(function)


def test_what_is_no_engine_is_refused() -> None:
    for engine, text in [(3, "not on int"), (object(), "not on object")]:
        with pytest.raises(InvalidRequestError, match=text):
            talk.run(engine, "Hi")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="concurrency must be a whole number from 1 to 1024, got 0"):
        talk.run("http://127.0.0.1:1", "Hi", concurrency=0)


def test_programs_call_programs(llm: LLM) -> None:
    @quire.program
    def both(s: State) -> str:
        return str(talk(s, QUESTIONS[0]))

    assert both.run(llm).text() == talk.run(llm, QUESTIONS[0]).text()


def test_an_llm_is_its_own_again_after_a_program(llm: LLM) -> None:
    """What a failed program leaves open is dropped; calls inside a program are refused, and none waits for ever."""

    @quire.program
    def leaves(s: State) -> None:
        s += "Once" + gen("x", max_tokens=1000, ignore_eos=True)
        raise ZeroDivisionError

    @quire.program
    def asks(s: State) -> None:
        llm.generate("Hi", use_tqdm=False)

    before = llm.generate("Hi", quire.SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text
    with pytest.raises(ZeroDivisionError):
        leaves.run(llm)
    assert not llm._engine.has_work
    for run in (lambda: asks.run(llm), lambda: asks.run_batch(llm, [{}])[0].call("x")):
        with pytest.raises((InvalidRequestError, ProgramError), match="asked by the program alone"):
            run()
    assert llm.generate("Hi", quire.SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text == before


def test_threads_take_turns_with_a_program(llm: LLM) -> None:
    entered, found = threading.Event(), list[str]()

    @quire.program
    def slow(s: State) -> None:
        s += "Hi" + gen("x", max_tokens=4)
        entered.set()
        s.wait()

    thread = threading.Thread(target=lambda: found.append(slow.run(llm)["x"]))
    thread.start()
    assert entered.wait(60)
    llm.generate("Hi", use_tqdm=False)
    thread.join(60)
    assert len(found) == 1


async def test_a_cancelled_run_is_aborted() -> None:
    engine, begun, ended = AsyncLLM(max_num_seqs=2), threading.Event(), threading.Event()
    found: list[str] = []

    @quire.program
    def endless(s: State) -> None:
        s += "Once" + gen("x", max_tokens=2000, ignore_eos=True)
        begun.set()
        try:
            found.append(s["x"])
        finally:
            ended.set()

    task = asyncio.create_task(endless.arun(engine))
    assert await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ended.wait, 60)
    assert found == [], "the function was told, and did not get the whole text"
    while engine.has_work:  # the abort is on its way
        await asyncio.sleep(0.01)
    engine.check()
    await engine.shutdown()


def test_a_state_whose_run_has_ended_asks_nothing_more(llm: LLM) -> None:
    state = talk.run(llm, QUESTIONS[0])
    with pytest.raises(EngineDeadError, match="has ended"):
        state += assistant(gen("late"))
    closed = LLM(max_num_seqs=1)
    closed.close()
    with pytest.raises(EngineDeadError, match="this LLM is closed"):
        talk.run(closed, "Hi")


def test_select_takes_the_most_likely(llm: LLM) -> None:
    """The embedded model knows these; scores are the means that its prompt log-probabilities give."""

    @quire.program
    def sums(s: State, question: str, options: list[str]) -> Call:
        s += user(question)
        s += assistant(select("sum", options))
        return s.call("sum")

    options = ["7 + 8 = 14.", "7 + 8 = 15.", "I do not know."]
    call = sums.run(llm, "What is 7 + 8?", options).returned
    assert call.text == options[1]
    params = quire.SamplingParams(max_tokens=1, prompt_logprobs=0)
    for option in options:
        messages = [{"role": "user", "content": "What is 7 + 8?"}, {"role": "assistant", "content": option}]
        begin, whole = (
            llm.chat(
                messages[:count],
                params,
                use_tqdm=False,
                add_generation_prompt=count == 1,
                continue_final_message=count == 2,
            )[0]
            for count in (1, 2)
        )
        start = len(begin.prompt_token_ids)
        assert whole.prompt_token_ids[:start] == begin.prompt_token_ids
        each = zip(whole.prompt_token_ids[start:], (whole.prompt_logprobs or [])[start:], strict=True)
        found = [position[token].logprob for token, position in each if position is not None]
        assert call.scores[option] == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_a_batch_survives_the_death_of_the_core(llm: LLM) -> None:
    """The core is killed while programs of a batch run on it: their states are those of an undisturbed run."""
    killed = threading.Lock()

    @quire.program
    def dying(s: State, question: str, kills: bool) -> None:
        talk(s, question)
        if kills and killed.acquire(blocking=False):
            (core,) = [one for one in psutil.Process().children() if "quire.compose.core_process" in one.cmdline()]
            core.kill()
            core.wait(60)
        s += user("And then?")
        s += assistant(gen("then", max_tokens=40, temperature=0.7))

    with LLM(max_num_seqs=8, core_process=True) as apart:
        disturbed = dying.run_batch(apart, [{"question": question, "kills": True} for question in QUESTIONS])
        assert killed.locked()
        assert apart._engine.channel.health.num_died == 1
    calm = dying.run_batch(llm, [{"question": question, "kills": False} for question in QUESTIONS])
    assert [facts(state) for state in disturbed] == [facts(state) for state in calm]
