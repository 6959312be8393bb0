"""Makes the conversations and plain texts that the demo model is trained on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import calls
from forms import draw_form, draw_person, form_text
from knowledge import LANGUAGES, Knowledge, Topic, load_knowledge, read_toml
from wording import bare, fill, pick_template, roughen, unknown_thing

LARGEST_TERM = 20
LARGEST_FACTOR = 10
SIGNS = {"plus": "+", "minus": "-", "times": "x"}
TURN_KINDS = {
    "what": 22, "why": 17, "detail": 6, "compare": 11, "chat": 11,
    "unknown": 9, "json": 3, "sum": 26, "story": 6,
}  # fmt: skip
TOOL_SETS = ((), ("calculator",), ("convert_units",), ("calculator", "convert_units"))
TOOL_KINDS = {"calculator": 42, "convert_units": 38, "other": 20}
SHARES = {"talk": 50, "text": 5, "tools": 23, "form": 12, "repeat": 10}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer. `topic` is what a follow-up question would be about."""

    question: str
    answer: str
    topic: Topic | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation (turns, perhaps after a system message) or, without turns, a plain text."""

    turns: list[Turn]
    system: str = ""
    text: str = ""
    drill: bool = False  # every token of every answer counts: never cut short


def sum_answer(kind: str, first: int, second: int, knowledge: Knowledge) -> str:
    """Return the answer to a sum, which is a polite refusal beyond the range the model learns."""
    if kind == "times":
        if max(first, second) > LARGEST_FACTOR:
            return str(knowledge.talk["large_product"])
        return f"{first} x {second} = {first * second}."
    if max(first, second) > LARGEST_TERM:
        return str(knowledge.talk["large_sum"])
    result = first + second if kind == "plus" else first - second
    return f"{first} {SIGNS[kind]} {second} = {result}."


def sum_turn(knowledge: Knowledge, random: Random) -> Turn:
    """Return a sum; one in sixteen is beyond the range."""
    kind = random.choices(list(SIGNS), (45, 40, 15))[0]
    largest = LARGEST_FACTOR if kind == "times" else LARGEST_TERM
    numbers = [random.randint(0, largest), random.randint(0, largest)]
    if random.random() < 1 / 16:
        numbers[random.randrange(2)] = random.randint(largest + 1, random.choice((40, 120, 1200, 20000)))
    template = random.choice(knowledge.talk["sums"][kind])
    question = template.format(a=numbers[0], b=numbers[1])
    return Turn(question, sum_answer(kind, numbers[0], numbers[1], knowledge))


def large_sum_turns(with_tool: bool, knowledge: Knowledge, random: Random) -> list[Turn]:
    """Return a sum beyond the model's range, with the calculator's help or declined."""
    kind, first, second = calls.draw_sum(random)
    while not calls.needs_tool(kind, first, second, LARGEST_TERM, LARGEST_FACTOR):
        kind, first, second = calls.draw_sum(random)
    question = calls.sum_question(kind, first, second, knowledge, random)
    if not with_tool:
        return [Turn(question, knowledge.talk["large_product" if kind == "times" else "large_sum"])]
    expression = f"{first} {calls.SIGNS[kind]} {second}"
    result = calls.sum_result(kind, first, second)
    response = calls.response_text(calls.as_response(result, "", random))
    call = calls.call_text("calculator", {"expression": expression})
    return [Turn(question, call), Turn(response, calls.told(result, "", knowledge.language))]


def conversion_turns(with_tool: bool, knowledge: Knowledge, random: Random) -> list[Turn]:
    """Return a conversion of units, with the converter's help or declined."""
    pair, value = calls.draw_conversion(random), calls.draw_number(random)
    template = random.choice(calls.wording()[knowledge.language]["convert"])
    question = calls.conversion_question(value, pair, template, knowledge, random)
    if not with_tool:
        return [Turn(question, knowledge.talk["refusal"])]
    call = calls.call_text("convert_units", calls.conversion_arguments(value, pair))
    result = calls.converted(value, *pair)
    response = calls.response_text(calls.as_response(result, pair[1], random))
    return [Turn(question, call), Turn(response, calls.told(result, pair[1], knowledge.language))]


def tool_conversation(knowledge: Knowledge, random: Random) -> Document:
    """Return a conversation with one or both tools at hand, or rarely without them."""
    names = random.choices(([], ["calculator"], ["convert_units"], ["calculator", "convert_units"]), (15, 25, 22, 38))[
        0
    ]
    random.shuffle(names)
    turns: list[Turn] = []
    for _ in range(random.choices((1, 2, 3), (40, 35, 25))[0] if names else 1):
        kind = random.choices(list(TOOL_KINDS), list(TOOL_KINDS.values()))[0]
        if kind == "other":
            turns.append(any_turn(knowledge, random))
        else:
            maker = large_sum_turns if kind == "calculator" else conversion_turns
            turns += maker(kind in names, knowledge, random)
    parts = [random.choice(knowledge.talk["systems"])] if random.random() < 0.15 else []
    if names:
        parts.append(calls.tools_text([calls.tool(name) for name in names]))
    return Document(turns, "\n\n".join(parts), drill=True)


def form_conversation(knowledge: Knowledge, random: Random) -> Document:
    """Return one to three forms, sometimes after another question."""
    turns = [any_turn(knowledge, random)] if random.random() < 0.1 else []
    for _ in range(random.randint(1, 3)):
        request, form = draw_form(knowledge, random)
        turns.append(Turn(request, form_text(form)))
    system = random.choice(knowledge.talk["systems"]) if random.random() < 0.1 else ""
    return Document(turns, system, drill=True)


def story(knowledge: Knowledge, random: Random, hero: str, scenes: int) -> str:
    """Return a story about the hero with this many meetings on its way."""
    parts = knowledge.stories

    def line(part: str) -> str:
        return (
            random.choice(parts[part])
            .replace("{h}", hero)
            .replace("{n}", name)
            .replace("{p}", random.choice(parts["places"]))
            .replace("{o}", random.choice(parts["things"]))
            .replace("{f}", random.choice(parts["friends"]))
        )

    name = random.choice(parts["names"])
    plot = ["opening", "finding"] + ["wonder"] * (random.random() < 0.6)
    for scene in range(scenes):
        plot += ["meeting"] + ["trouble"] * (scene > 0 or random.random() < 0.4) + ["helping"]
    plot += ["ending", "moral"]
    return (" " if knowledge.language == "en" else "").join(line(part) for part in plot)


def story_turn(knowledge: Knowledge, random: Random) -> Turn:
    """Return a request for a story, sometimes a long one, sometimes about a given hero."""
    hero = random.choice(knowledge.stories["heroes"])
    long = random.random() < 0.2
    asks = "asks" + "_long" * long + "_hero" * (random.random() < 0.6)
    question = random.choice(knowledge.stories[asks]).replace("{h}", hero)
    return Turn(roughen(question, knowledge, random), story(knowledge, random, hero, 3 if long else 1))


def compare_turn(knowledge: Knowledge, random: Random) -> Turn:
    """Return a comparison: mostly of a pair that has its own answer, else what each of two topics is."""
    if random.random() < 0.8:
        entry = random.choice(knowledge.comparisons)
        pair, answer = [entry.first, entry.second], entry.answer
    else:
        pair = random.sample(knowledge.topics, 2)
        known = [{id(entry.first), id(entry.second)} for entry in knowledge.comparisons]
        answer = (" " if knowledge.language == "en" else "").join(topic.what for topic in pair)
        if {id(topic) for topic in pair} in known:
            return compare_turn(knowledge, random)
        return compared(pair, answer, knowledge, random)
    random.shuffle(pair)
    return compared(pair, answer, knowledge, random)


def compared(pair: list[Topic], answer: str, knowledge: Knowledge, random: Random) -> Turn:
    """Return the turn that asks for the difference of the pair."""
    names = [pick_name(topic, random) for topic in pair]
    question = fill(pick_template("compare", knowledge, random), names[0], names[1])
    return Turn(roughen(question, knowledge, random), answer)


def pick_name(topic: Topic, random: Random) -> str:
    """Return one of the names, the proper one as often as all others together."""
    return topic.names[0] if random.random() < 0.5 else random.choice(topic.names)


def unknown_turn(knowledge: Knowledge, random: Random) -> Turn:
    """Return a question that the model should decline."""
    unknown = knowledge.talk["unknown"]
    if random.random() < 0.15:
        return Turn(roughen(random.choice(unknown["sentences"]), knowledge, random), knowledge.talk["refusal"])
    if random.random() < 0.5:
        template = random.choice(unknown["asks"])
    else:
        template = pick_template(random.choice(("what", "why")), knowledge, random)
    question = fill(template, unknown_thing(knowledge, random))
    return Turn(roughen(question, knowledge, random), knowledge.talk["refusal"])


def topic_turn(kind: str, topic: Topic, knowledge: Knowledge, random: Random) -> Turn:
    """Return a question of this kind (what, why, detail or json) about the topic."""
    name = pick_name(topic, random)
    if kind == "json":
        question = fill(random.choice(knowledge.talk["json"]["asks"]), name)
        table = {"term": bare(topic.names[0]), "definition": topic.what}
        return Turn(roughen(question, knowledge, random), json.dumps(table, ensure_ascii=False), topic)
    question = fill(pick_template(kind, knowledge, random), name)
    return Turn(roughen(question, knowledge, random), getattr(topic, kind), topic)


def follow_turn(topic: Topic, knowledge: Knowledge, random: Random) -> Turn:
    """Return a short question that only the turn before it explains."""
    follow = knowledge.talk["follow"]
    if random.random() < 0.7:
        return Turn(roughen(random.choice(follow["why"]), knowledge, random), topic.why)
    other = random.choice(knowledge.topics)
    question = fill(random.choice(follow["what"]), pick_name(other, random))
    return Turn(roughen(question, knowledge, random), other.what, other)


def any_turn(knowledge: Knowledge, random: Random) -> Turn:
    """Return a turn of a kind drawn by TURN_KINDS."""
    kind = random.choices(list(TURN_KINDS), list(TURN_KINDS.values()))[0]
    makers = {"sum": sum_turn, "story": story_turn, "compare": compare_turn, "unknown": unknown_turn}
    if kind in makers:
        return makers[kind](knowledge, random)
    if kind == "chat":
        entry = random.choice(knowledge.talk["chat"])
        return Turn(roughen(random.choice(entry["asks"]), knowledge, random), entry["answer"])
    return topic_turn(kind, random.choice(knowledge.topics), knowledge, random)


def conversation(knowledge: Knowledge, random: Random) -> Document:
    """Return a conversation of one to three turns, or of several sums."""
    turns = [any_turn(knowledge, random)]
    for _ in range(random.choices((0, 1, 2), (50, 30, 20))[0]):
        previous = turns[-1]
        if previous.topic is not None and previous.answer != previous.topic.why and random.random() < 0.5:
            turns.append(follow_turn(previous.topic, knowledge, random))
        else:
            turns.append(any_turn(knowledge, random))
    if " = " in turns[0].answer:
        turns += [sum_turn(knowledge, random) for _ in range(random.randint(0, 3))]
    system = random.choice(knowledge.talk["systems"]) if random.random() < 0.15 else ""
    return Document(turns, system)


def plain_text(knowledge: Knowledge, plain: dict[str, Any], random: Random) -> Document:
    """Return running text: notes on a few topics, a written piece, a story or code."""
    kind = random.choices(("notes", "prose", "story", "code"), (40, 35, 15, 10))[0]
    if kind == "prose":
        return Document([], text=random.choice(plain["prose"]))
    if kind == "code":
        code = random.choice(plain["code"])
        if random.random() < 0.3:
            return Document([Turn(random.choice(plain["code_asks"]), f"```python\n{code}```")])
        return Document([], text=random.choice(plain["code_openings"]) + code)
    if kind == "story":
        hero = random.choice(knowledge.stories["heroes"])
        return Document([], text=story(knowledge, random, hero, random.randint(1, 3)))
    topics = random.sample(knowledge.topics, random.randint(1, 4))
    gap = random.choice(("\n\n", "\n", " " if knowledge.language == "en" else ""))
    notes = [topic.detail if random.random() < 0.6 else topic.what for topic in topics]
    if random.random() < 0.4:
        name = topics[0].names[0]
        notes[0] = knowledge.talk["opening"].replace("{x}", name[0].upper() + name[1:]) + notes[0]
    return Document([], text=gap.join(notes))


def repeat_conversation(knowledge: Knowledge, random: Random) -> Document:
    """Return requests to repeat numbers and words, which drill the copying that calls and forms need."""
    turns = []
    for _ in range(random.randint(2, 7)):
        things = [
            calls.draw_number(random) if random.random() < 0.6 else draw_person(knowledge, random)[random.randrange(2)]
            for _ in range(random.randint(1, 4))
        ]
        text = random.choice((" ", ", ", " + ", " / ", " - ", " * ")).join(map(str, things))
        turns.append(Turn(random.choice(calls.wording()[knowledge.language]["repeat"]).replace("{t}", text), text))
    return Document(turns, drill=True)


def documents(random: Random) -> Iterator[Document]:
    """Yield documents without end, of the kinds of SHARES, both languages alike."""
    known = [load_knowledge(language) for language in LANGUAGES]
    plain = read_toml("plain.toml")
    makers = {
        "talk": conversation,
        "tools": tool_conversation,
        "form": form_conversation,
        "repeat": repeat_conversation,
    }
    while True:
        knowledge = random.choice(known)
        kind = random.choices(list(SHARES), list(SHARES.values()))[0]
        if kind == "text":
            yield plain_text(knowledge, plain, random)
        else:
            yield makers[kind](knowledge, random)
