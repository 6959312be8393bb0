"""A form that is filled field by field: the program writes the keys, the model the values, each held to a shape.

The embedded model has learned what these terms are. What they are about, and in which language that is said, it has
not: those fields are only well formed.
"""

import json

import quire
from quire import LLM
from quire.programs import State, assistant, gen, select, user

TERMS = ["TTFT", "PagedAttention", "Quantisation", "Continuous batching"]
SUBJECTS = {"type": "array", "items": {"enum": ["latency", "memory", "throughput"]}, "minItems": 1, "maxItems": 1}


@quire.program
def entry(s: State, term: str) -> dict[str, object]:
    """One entry of a glossary."""
    s += user(f"Give me the definition of {term} as JSON")
    s += assistant(
        '{"term": "' + gen("term", choices=TERMS),
        '", "definition": "' + gen("definition", regex=r'[A-Z][^"\\\n]{20,300}\.', temperature=0.0),
        '", "about": ' + gen("about", json=SUBJECTS, temperature=0.0),
        ', "language": "' + select("language", ["English", "Chinese"]) + '"}',
    )
    return dict(json.loads(s.messages()[-1]["content"]))


def main() -> None:
    """Fill four forms at once."""
    with LLM(max_num_seqs=16) as llm:
        states = entry.run_batch(llm, [{"term": term} for term in TERMS])
    for state in states:
        if state.error is not None:
            raise state.error
        print(json.dumps(state.returned, indent=2))
    written = sum(call.usage.completion_tokens for state in states for call in state.calls if not call.scores)
    prompts = sum(state.usage.prompt_tokens for state in states)
    shared = sum(state.usage.cached_tokens or 0 for state in states)
    print(f"{written} tokens were generated, the keys were not. Of {prompts} prompt tokens {shared} were shared.")


if __name__ == "__main__":
    main()
