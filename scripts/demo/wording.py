"""Turns a question template and a name into a question, and roughens it as people do."""

import re
from random import Random

from knowledge import Knowledge

ARTICLE = re.compile(r"^(a|an|the) ")
CHINESE_SPACE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) | (?=[\u3000-\u9fff\uff00-\uffef])")
ENDINGS = "?.？。嗎呢 "
SYLLABLES = "ba ko ri lu men tar vo sil dra pe nu fi gor zan hul tec mo wex qua lin".split()


def bare(name: str) -> str:
    """Return the name without its English article."""
    return ARTICLE.sub("", name)


def fill(template: str, first: str, second: str = "") -> str:
    """Return the template with {x}, {b} (the bare name) and {y} filled in.

    No space is left where a Chinese name meets a Chinese sentence.
    """
    text = template.replace("{x}", first).replace("{b}", bare(first)).replace("{y}", second)
    if template.isascii():
        return text[0].upper() + text[1:] if template[0] == "{" and first[0].islower() else text
    return re.sub(r"(?<=[\u3000-\u9fff]) (?=[\u3000-\u9fff])", "", text)


def pick_template(kind: str, knowledge: Knowledge, random: Random) -> str:
    """Return a wording of this kind (what, why, detail or compare) that is not held out."""
    questions = knowledge.questions
    frames = [questions[key] for key in (f"{kind}_frames", f"{kind}_more_frames") if key in questions]
    if not frames or random.random() < 0.5:
        return str(random.choice(questions[kind]))
    while True:
        template = "".join(random.choice(parts) for parts in random.choice(frames)).strip()
        held_out = [held.rstrip(ENDINGS) for held in questions[f"{kind}_held_out"]]
        if ("{x}" in template or "{b}" in template) and template.rstrip(ENDINGS) not in held_out:
            return template


def misspell(text: str, random: Random) -> str:
    """Return the text with two letters swapped or one left out, inside a word long enough to bear it."""
    place = random.randrange(2, max(3, len(text) - 2))
    around = text[place - 2 : place + 3]
    if len(around) < 5 or not (around.isascii() and around.isalpha()):
        return text
    if random.random() < 0.5:
        return text[:place] + text[place + 1 :]
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def surround(question: str, knowledge: Knowledge, random: Random) -> str:
    """Sometimes add a greeting before the question or a wish after it."""
    if random.random() < 0.25:
        if random.random() < 0.5 and not question[:2].isupper():
            question = question[0].lower() + question[1:]
        question = random.choice(knowledge.questions["before"]) + question
    if random.random() < 0.15:
        mark = question[-1] if question[-1] in "?？" else ""
        wish = random.choice(knowledge.questions["after"])
        apart = wish.strip()[0].isupper() or knowledge.language == "zh"
        question = question + wish if apart or not mark else question[:-1] + wish + mark
    return question


def roughen(question: str, knowledge: Knowledge, random: Random) -> str:
    """Return the question with the punctuation, case, spacing and typing of a hasty writer."""
    question = surround(question, knowledge, random)
    if random.random() < 0.2:
        question = question.rstrip("?？!.")
    elif random.random() < 0.2:
        question = question.replace("？", "?") if "？" in question else question + random.choice("?!.")
    if not question.isascii() and random.random() < 0.5:
        question = CHINESE_SPACE.sub("", question)
    chance = random.random()
    if chance < 0.2:
        question = question.lower()
    elif chance < 0.22:
        question = question.upper()
    if random.random() < 0.06:
        question = misspell(question, random)
    return question


def unknown_thing(knowledge: Knowledge, random: Random) -> str:
    """Return the name of something that the model does not know, sometimes an invented word."""
    things: list[str] = knowledge.talk["unknown"]["things"]
    if random.random() < 0.75:
        return random.choice(things)
    if knowledge.language == "zh" and random.random() < 0.6:
        return "".join(random.choice(random.choice(things)) for _ in range(random.randint(2, 4)))
    word = "".join(random.choices(SYLLABLES, k=random.randint(2, 4)))
    return random.choice((word, word.capitalize(), word[:4].upper(), word + " " + random.choice(SYLLABLES)))
