"""Measures the demo model with transformers and prints figures, failures and samples.

python scripts/demo/evaluate.py src/quire/demo/model
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import calls
import torch
from conversations import LARGEST_FACTOR, LARGEST_TERM, SIGNS, sum_answer
from forms import draw_form, form_text
from knowledge import LANGUAGES, Knowledge, load_knowledge
from train_tokenizer import CHAT_TEMPLATE
from transformers import AutoTokenizer, LlamaForCausalLM
from wording import fill

BATCH = 64
TOOL_CASES = 300  # of each group that numbers or names are drawn for, before `--part`
FORMS_OF_SUMS = (0, 1, 4)  # of the templates for each sign: a question, the bare sum, the sum in words
CHATS = {
    "en": [["What is PagedAttention?", "Why does it matter?", "Thanks!"], ["Hi", "7 + 8", "And what is TTFT?"]],
    "zh": [["PagedAttention 是什麼？", "為什麼重要？", "謝謝！"], ["你好", "7 + 8", "那 TTFT 呢？"]],
}
STORIES = ["Tell me a story about a robot", "Write a long story", "說一個小貓的故事"]
OPENINGS = ["Hello, ", "Explain AI: ", "Code example:", "PagedAttention is", "The capital of France is", "量化"]


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends in a question, perhaps with tools, and the answer it should get."""

    group: str
    messages: list[dict[str, Any]]
    answer: str
    tools: list[calls.Tool] | None = None


def asking(*texts: str) -> list[dict[str, Any]]:
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


def draw_tools(random: Random, needed: str = "") -> list[calls.Tool]:
    """Return the tool that is needed, or the other one too; without a need both."""
    names = ["calculator", "convert_units"] if not needed or random.random() < 0.5 else [needed]
    random.shuffle(names)
    return [calls.tool(name) for name in names]


def called(group: str, question: str, call: tuple[str, dict[str, Any]], result: str, answer: str) -> tuple[Case, Case]:
    """Return the case of a call, and the case of the answer after the tool's response, both yet without tools."""
    name, arguments = call
    function = {"name": name, "arguments": arguments}
    asked: list[dict[str, Any]] = asking(question)
    replied = [
        *asked,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": result},
    ]
    first = Case(f"call, {group}", asked, calls.call_text(name, arguments))
    return first, Case(f"answer after a response, {group}", replied, answer)


def large_sum_cases(knowledge: Knowledge, random: Random) -> Iterator[Case]:
    """Yield sums of held-out numbers: the call, the answer, and now and then no calculator at hand."""
    for number in range(TOOL_CASES):
        kind, first, second = calls.draw_sum(random, held_out=True)
        question = calls.sum_question(kind, first, second, knowledge, random)
        expression, result = f"{first} {calls.SIGNS[kind]} {second}", calls.sum_result(kind, first, second)
        call = ("calculator", {"expression": expression})
        tools = draw_tools(random, "calculator")
        for case in called("calculator", question, call, result, calls.told(result, "", knowledge.language)):
            yield replace(case, tools=tools)
        if number % 5 == 0:
            refusal = knowledge.talk["large_product" if kind == "times" else "large_sum"]
            other = random.choice((None, [calls.tool("convert_units")]))
            yield Case("declined without the tool", asking(question), refusal, other)


def conversion_cases(knowledge: Knowledge, random: Random) -> Iterator[Case]:
    """Yield conversions of held-out numbers, half of them in held-out wordings, as `large_sum_cases` does sums."""
    words = calls.wording()[knowledge.language]
    for number in range(TOOL_CASES):
        pair, value = calls.draw_conversion(random), calls.draw_number(random, held_out=True)
        template = random.choice(words["convert" + "_held_out" * (number % 2)])
        question = calls.conversion_question(value, pair, template, knowledge, random)
        result = calls.converted(value, *pair)
        call = ("convert_units", calls.conversion_arguments(value, pair))
        answer = calls.told(result, pair[1], knowledge.language)
        tools = draw_tools(random, "convert_units")
        for case in called("converter", question, call, result, answer):
            yield replace(case, tools=tools)
        if number % 5 == 0:
            other = random.choice((None, [calls.tool("calculator")]))
            yield Case("declined without the tool", asking(question), knowledge.talk["refusal"], other)


def beside_tools_cases(knowledge: Knowledge) -> Iterator[Case]:
    """Yield what the model knows by itself, asked while both tools are at hand."""
    random = Random(2)
    known = [case for case in topic_cases(knowledge) if case.group.endswith("proper name")]
    for case in random.sample(known, TOOL_CASES // 2):
        yield replace(case, group="known, beside tools", tools=draw_tools(random))
    for case in random.sample(list(sum_cases(knowledge)), TOOL_CASES // 2):
        yield replace(case, group="small sums, beside tools", tools=draw_tools(random))


def form_cases(knowledge: Knowledge) -> Iterator[Case]:
    """Yield forms about people of held-out names and cities, in held-out wordings."""
    random = Random(3)
    for _ in range(TOOL_CASES):
        request, form = draw_form(knowledge, random, held_out=True)
        yield Case("forms", asking(request), form_text(form))


class Demo:
    """The model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.chat_template = CHAT_TEMPLATE  # weights from before it are asked in the same way
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

    def prompt(self, messages: list[dict[str, Any]], tools: list[calls.Tool] | None = None) -> str:
        """Return the chat template's text for the messages."""
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        return str(text)

    def right(self, cases: list[Case], show: int) -> dict[str, list[bool]]:
        """Return for each group which cases were answered exactly; print the first `show` failures."""
        results: dict[str, list[bool]] = {}
        cases = sorted(cases, key=lambda case: len(case.answer))
        for start in range(0, len(cases), BATCH):
            batch = cases[start : start + BATCH]
            for case, answer in zip(
                batch, self.complete([self.prompt(c.messages, c.tools) for c in batch]), strict=True
            ):
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
            messages: list[dict[str, Any]] = []
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
    parser.add_argument("--tools-only", action="store_true", help="measure only what is new: calls, answers, forms")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo = Demo(options.folder)
    for language in LANGUAGES:
        knowledge = load_knowledge(language)
        cases = [] if options.tools_only else [*topic_cases(knowledge), *other_cases(knowledge), *sum_cases(knowledge)]
        cases += [
            *large_sum_cases(knowledge, Random(1)),
            *conversion_cases(knowledge, Random(4)),
            *beside_tools_cases(knowledge),
            *form_cases(knowledge),
        ]
        random = Random(0)
        cases = [case for case in cases if random.random() < options.part]
        for group, exact in sorted(demo.right(cases, options.show).items()):
            print(f"{language} {group}: {sum(exact)} of {len(exact)}, {sum(exact) / len(exact):.2%}", flush=True)
    if not options.tools_only:
        print_samples(demo)


if __name__ == "__main__":
    main()
