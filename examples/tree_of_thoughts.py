"""A tree of thoughts: several next steps are proposed at once, each is checked, and one that stands goes on.

The task is a chain of sums. A step proposes the next result, at a temperature where the model errs now and then; the
check asks the reverse question. Branches share everything that was said before they parted.
"""

import quire
from quire import LLM
from quire.programs import Forks, State, assistant, gen, user

START, STEPS, WIDTH = 7, [8, -6, 5, -9], 4
NUMBER = r"[0-9]{1,2}\."
"""The full stop belongs to it: without one, a model that wants to end has nothing left but another digit."""


def number(text: str) -> int:
    """What a text of `NUMBER` says."""
    return int(text.removesuffix("."))


def ask(s: State, start: int, step: int, name: str, temperature: float) -> None:
    """One sum, and a place for its result."""
    written = f"{start} {'+' if step > 0 else '-'} {abs(step)}"
    s += user(f"What is {written}?")
    s += assistant(f"{written} = ", gen(name, regex=NUMBER, temperature=temperature))


@quire.program
def search(s: State) -> list[int]:
    """A chain of results of which each was checked."""
    chain, at = [START], s
    for step in STEPS:
        branches: Forks = at.fork(WIDTH)
        for branch in branches:
            ask(branch, chain[-1], step, "result", temperature=2.2)
        results = [number(text) for text in branches.values("result")]
        for branch, result in zip(branches, results, strict=True):
            ask(branch, result, -step, "back", temperature=0.0)
        good = [place for place, text in enumerate(branches.values("back")) if number(text) == chain[-1]]
        print(f"{chain[-1]} {step:+d}: proposed {results}, checked {[results[place] for place in good]}")
        if not good:
            return chain
        chain.append(results[good[0]])
        at = branches[good[0]]
    return chain


def main() -> None:
    """Search, and say what the branches shared."""
    with LLM(max_num_seqs=16) as llm:
        state = search.run(llm, seed=1)
    print(" -> ".join(map(str, state.returned)))
    usage = state.usage
    print(
        f"{usage.requests} requests generated {usage.completion_tokens} tokens. Of {usage.prompt_tokens} prompt tokens "
        f"{usage.cached_tokens} came from the prefix cache."
    )


if __name__ == "__main__":
    main()
