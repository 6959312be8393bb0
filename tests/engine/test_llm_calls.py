"""How programs call `LLM`: many prompts, generators, threads, changed parameters, refused batches."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.errors import EngineDeadError, InvalidRequestError

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(model=str(tiny_model), max_num_seqs=4, max_model_len=128) as llm:
        yield llm


def tokens_of(outputs: Any) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


def test_prompts_of_a_generator_are_drawn_as_there_is_room(llm: LLM) -> None:
    """Never more than twice as many as there are rows; and the answers are those of the list."""
    open_at_draw: list[int] = []

    def prompts() -> Iterator[str]:
        for number in range(40):
            open_at_draw.append(llm._engine.num_open)
            yield f"number {number}"

    drawn = llm.generate(prompts(), PARAMS, use_tqdm=False)
    listed = llm.generate([f"number {number}" for number in range(40)], PARAMS, use_tqdm=False)
    assert [item.prompt for item in drawn] == [f"number {number}" for number in range(40)]
    assert tokens_of(drawn) == tokens_of(listed)
    assert max(open_at_draw) == 7 and llm._engine.num_open == 0


def test_of_a_list_too_only_so_many_are_open(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    step = llm._engine.step

    def watched() -> Any:
        seen.append(llm._engine.num_open)
        return step()

    monkeypatch.setattr(llm._engine, "step", watched)
    assert len(llm.generate(["a"] * 50, PARAMS, use_tqdm=False)) == 50
    assert max(seen) == 8


def test_conversations_of_a_generator_are_drawn_too(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    drawn = llm.chat((one for one in conversations), PARAMS, use_tqdm=False)
    assert tokens_of(drawn) == tokens_of(llm.chat(conversations, PARAMS, use_tqdm=False))


def test_what_goes_wrong_while_prompts_are_drawn_leaves_nothing(llm: LLM) -> None:
    def prompts(last: Any) -> Iterator[Any]:
        yield from ["a"] * 6
        if isinstance(last, Exception):
            raise last
        yield last

    with pytest.raises(KeyError):
        llm.generate(prompts(KeyError("mine")), PARAMS, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="token ids"):
        llm.generate(prompts(7), PARAMS, use_tqdm=False)
    for options in ({"priority": [0] * 7}, {"sampling_params": [PARAMS] * 7}):
        with pytest.raises(InvalidRequestError, match="one by one"):
            llm.generate(prompts("b"), use_tqdm=False, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="another call"):
        llm.generate((llm.generate("x", use_tqdm=False)[0].prompt for _ in range(1)), PARAMS, use_tqdm=False)  # type: ignore[misc]
    assert not llm._engine.has_work and llm._is_whole
    llm._engine.channel.check()
    assert len(llm.generate("a", PARAMS, use_tqdm=False)) == 1


@pytest.mark.parametrize("data", [b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_bytes_are_no_token_ids(llm: LLM, data: Any) -> None:
    for prompt in (data, [data], {"prompt_token_ids": data}):
        with pytest.raises(InvalidRequestError, match="token ids"):
            llm.generate(prompt, PARAMS, use_tqdm=False)


def test_threads_take_turns(llm: LLM) -> None:
    """Each gets the answers that it gets alone."""
    prompts = [[f"thread {number}, prompt {index}" for index in range(12)] for number in range(3)]
    alone = [tokens_of(llm.generate(mine, PARAMS, use_tqdm=False)) for mine in prompts]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = tokens_of(llm.generate(prompts[number], PARAMS, use_tqdm=False))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(3)] == alone


def test_a_refused_batch_does_not_move_the_seeds_of_what_comes_later(tiny_model: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)

    def answers(*, refused: bool) -> list[list[int]]:
        with LLM(model=str(tiny_model), max_num_seqs=4, max_model_len=64) as llm:
            if refused:
                with pytest.raises(InvalidRequestError):
                    llm.generate(["a", "b", [10**9]], params, use_tqdm=False)
            return tokens_of(llm.generate(["c", "d"], params, use_tqdm=False))

    assert answers(refused=True) == answers(refused=False)


def test_parameters_that_were_changed_are_checked_again(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4)
    params.top_p = 7.0
    with pytest.raises(InvalidRequestError, match="top_p"):
        llm.generate("a", params, use_tqdm=False)
    params.top_p, params.stop = 1.0, "x"  # a list of strings when it is checked
    assert llm.generate("a", params, use_tqdm=False)[0].finished


def test_siblings_do_not_count_as_cached(llm: LLM) -> None:
    prompt = [20 + index % 7 for index in range(64)]
    (first,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(n=3, max_tokens=2), use_tqdm=False)
    (again,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(n=3, max_tokens=2), use_tqdm=False)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 48)


@pytest.mark.parametrize("core_process", [False, True])
def test_a_closed_one_says_so(tiny_model: Path, core_process: bool) -> None:
    llm = LLM(str(tiny_model), core_process=core_process)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="this LLM is closed"):
        llm.generate("x", use_tqdm=False)


def test_a_call_that_ended_is_in_nobodys_way(llm: LLM) -> None:
    """One thread's call after another's, and after a call of its own that failed."""
    with pytest.raises(InvalidRequestError):
        llm.generate([""], use_tqdm=False)
    assert llm._owner is None
    with pytest.raises(InvalidRequestError, match="another call of it"):
        llm.generate((llm.generate("x", use_tqdm=False) for _ in "a"), use_tqdm=False)  # type: ignore[arg-type]
    assert llm._owner is None and llm.generate("x", use_tqdm=False)
