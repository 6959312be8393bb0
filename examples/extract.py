"""An extraction that checks itself: a term is read from an answer, and read again until its own answer agrees."""

import quire
from quire import LLM
from quire.programs import State, assistant, gen, user

QUESTIONS = [
    "My boss keeps talking about PagedAttention. What is it?",
    "what does ttft stand for",
    "Can you define speculative decoding for me?",
    "Explain the KV cache to my team",
    "I read about quantization today",
]
TRIES = 4


@quire.program
def extract(s: State, question: str) -> tuple[str, int] | None:
    """The term that an answer is about, and how often it was read; None: never twice the same."""
    checks = s.fork(TRIES)  # conversations of their own: nothing was said yet
    s += user(question)
    s += assistant(gen("answer", max_tokens=80, temperature=0.0))
    s += user("Give me the definition as JSON")
    for tries, (attempt, check) in enumerate(zip(s.fork(TRIES), checks, strict=True), 1):
        temperature = 0.0 if tries == 1 else 1.2
        attempt += assistant('{"term": "', gen("term", max_tokens=12, stop='"', temperature=temperature))
        check += user(f"What is {attempt['term']}?")
        check += assistant(gen("answer", max_tokens=80, temperature=0.0))
        if check["answer"] == s["answer"]:
            return attempt["term"], tries
    return None


def main() -> None:
    """Extract from all answers at once."""
    with LLM(max_num_seqs=16) as llm:
        states = extract.run_batch(llm, [{"question": question} for question in QUESTIONS])
    for question, state in zip(QUESTIONS, states, strict=True):
        if state.error is not None:
            raise state.error
        found = "nothing that agreed" if state.returned is None else f"{state.returned[0]!r}, try {state.returned[1]}"
        print(f"{question}\n  {state['answer']}\n  term: {found}")
    prompts = sum(state.usage.prompt_tokens for state in states)
    shared = sum(state.usage.cached_tokens or 0 for state in states)
    print(f"Of {prompts} prompt tokens {shared} came from the prefix cache.")


if __name__ == "__main__":
    main()
