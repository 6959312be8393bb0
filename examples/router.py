"""A router: each question goes to the page whose subject the model would most likely begin its answer with."""

import quire
from quire import LLM
from quire.programs import State, assistant, select, user

PAGES = {
    "PagedAttention": "docs/design/attention.md",
    "Quantisation": "docs/design/quantized.md",
    "TTFT": "docs/guide/metrics.md",
    "Continuous batching": "docs/design/ordering.md",
    "I only know about LLM inference": "no page: this is about something else",
}
QUESTIONS = [
    "My boss keeps talking about PagedAttention. What is it?",
    "How many bits does quantisation need?",
    "what does ttft stand for",
    "What is continuous batching?",
    "What is the capital of France?",
]


@quire.program
def route(s: State, question: str) -> str:
    """The page for a question: nothing is generated, the beginnings are only compared."""
    s += user(question)
    s += assistant(select("subject", list(PAGES)))
    return PAGES[s["subject"]]


def main() -> None:
    """Route all questions at once."""
    with LLM(max_num_seqs=32) as llm:
        states = route.run_batch(llm, [{"question": question} for question in QUESTIONS])
    for question, state in zip(QUESTIONS, states, strict=True):
        scores = sorted(state.call("subject").scores.values(), reverse=True)
        print(f"{question}\n  {state.returned} ({scores[0]:.2f} a token; the next {scores[1]:.2f})")
    requests = sum(state.usage.requests for state in states)
    prompts = sum(state.usage.prompt_tokens for state in states)
    shared = sum(state.usage.cached_tokens or 0 for state in states)
    print(f"{requests} tokens were looked at. Of {prompts} prompt tokens {shared} came from the prefix cache.")


if __name__ == "__main__":
    main()
