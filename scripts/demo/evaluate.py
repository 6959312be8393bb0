"""Measures the demo model with transformers and prints figures, failures and samples.

python scripts/demo/evaluate.py src/quire/demo/model
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from conversations import LARGEST_FACTOR, LARGEST_TERM, SIGNS, sum_answer
from knowledge import LANGUAGES, Knowledge, load_knowledge
from transformers import AutoTokenizer, LlamaForCausalLM
from wording import fill

BATCH = 64
FORMS_OF_SUMS = (0, 1, 4)  # of the templates for each sign: a question, the bare sum, the sum in words
CHATS = {
    "en": [["What is PagedAttention?", "Why does it matter?", "Thanks!"], ["Hi", "7 + 8", "And what is TTFT?"]],
    "zh": [["PagedAttention 是什麼？", "為什麼重要？", "謝謝！"], ["你好", "7 + 8", "那 TTFT 呢？"]],
}
STORIES = ["Tell me a story about a robot", "Write a long story", "說一個小貓的故事"]
OPENINGS = ["Hello, ", "Explain AI: ", "Code example:", "PagedAttention is", "The capital of France is", "量化"]


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends in a question, and the answer it should get."""

    group: str
    messages: list[dict[str, str]]
    answer: str


def asking(*texts: str) -> list[dict[str, str]]:
    """Return messages from user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def topic_cases(knowledge: Knowledge) -> Iterator[Case]:
    """Yield every topic in every held-out wording, first by its proper name, then by its other names."""
    for kind in ("what", "why", "detail"):
        for topic in knowledge.topics:
            for number, template in enumerate(knowledge.questions[f"{kind}_held_out"]):
                answer = getattr(topic, kind)
                yield Case(f"{kind}, proper name", asking(fill(template, topic.names[0])), answer)
                other = topic.names[1 + number % (len(topic.names) - 1)]
                yield Case(f"{kind}, other names", asking(fill(template, other)), answer)


def other_cases(knowledge: Knowledge) -> Iterator[Case]:
    """Yield held-out comparisons (both orders), follow-up questions, and things that are to be declined."""
    for entry in knowledge.comparisons:
        for template in knowledge.questions["compare_held_out"]:
            for pair in ((entry.first, entry.second), (entry.second, entry.first)):
                question = fill(template, pair[0].names[0], pair[1].names[0])
                yield Case("comparisons", asking(question), entry.answer)
    for topic in knowledge.topics:
        first = fill(knowledge.questions["what_held_out"][0], topic.names[0])
        follow = knowledge.talk["follow"]["why"][0]
        yield Case("follow-up", asking(first, topic.what, follow), topic.why)
    unknown = knowledge.talk["unknown"]
    for thing in unknown["things_held_out"]:
        for template in unknown["asks"][:6]:
            yield Case("declined", asking(fill(template, thing)), knowledge.talk["refusal"])


def sum_cases(knowledge: Knowledge) -> Iterator[Case]:
    """Yield every sum of the range in a few forms."""
    for kind in SIGNS:
        largest = LARGEST_FACTOR if kind == "times" else LARGEST_TERM
        for form in FORMS_OF_SUMS:
            template = knowledge.talk["sums"][kind][form]
            for a in range(largest + 1):
                for b in range(largest + 1):
                    answer = sum_answer(kind, a, b, knowledge)
                    yield Case(f"sums, {kind}", asking(template.format(a=a, b=b)), answer)


class Demo:
    """The model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def complete(self, prompts: list[str], max_tokens: int = 200, **settings: Any) -> list[str]:
        """Return what the model writes after each prompt, greedily unless the settings say otherwise."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=max_tokens,
                **settings,
            )
        texts = self.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [str(text) for text in texts]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """Return the chat template's text for the messages."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def right(self, cases: list[Case], show: int) -> dict[str, list[bool]]:
        """Return for each group which cases were answered exactly; print the first `show` failures."""
        results: dict[str, list[bool]] = {}
        cases = sorted(cases, key=lambda case: len(case.answer))
        for start in range(0, len(cases), BATCH):
            batch = cases[start : start + BATCH]
            for case, answer in zip(batch, self.complete([self.prompt(c.messages) for c in batch]), strict=True):
                exact = answer.strip() == case.answer.strip()
                results.setdefault(case.group, []).append(exact)
                if not exact and show > 0:
                    show -= 1
                    print(f"  {case.group}: {case.messages[-1]['content']}\n    -> {answer}")
        return results


def print_samples(demo: Demo) -> None:
    """Print conversations, stories (greedy and sampled) and plain completions."""
    for chats in CHATS.values():
        for chat in chats:
            messages: list[dict[str, str]] = []
            for question in chat:
                messages += asking(question)
                answer = demo.complete([demo.prompt(messages)])[0]
                messages.append({"role": "assistant", "content": answer})
                print(f"user: {question}\ndemo: {answer}")
            print()
    torch.manual_seed(0)
    for request in STORIES:
        prompt = demo.prompt(asking(request))
        for settings in ({}, {"do_sample": True, "temperature": 1.0}):
            print(request, settings, "\n ", demo.complete([prompt], 400, **settings)[0])
    for opening in OPENINGS:
        print(repr(opening), "\n ", demo.complete([opening], 80)[0])


def main() -> None:
    """Measure both languages, then show samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", type=int, default=10, help="failures to print per language")
    parser.add_argument("--part", type=float, default=1.0, help="fraction of the cases to measure")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo = Demo(options.folder)
    for language in LANGUAGES:
        knowledge = load_knowledge(language)
        cases = [*topic_cases(knowledge), *other_cases(knowledge), *sum_cases(knowledge)]
        random = Random(0)
        cases = [case for case in cases if random.random() < options.part]
        for group, exact in sorted(demo.right(cases, options.show).items()):
            print(f"{language} {group}: {sum(exact)} of {len(exact)}, {sum(exact) / len(exact):.2%}", flush=True)
    print_samples(demo)


if __name__ == "__main__":
    main()
