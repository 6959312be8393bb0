"""Makes the demo model's forms: a few fields, a text about a person, and the JSON object that it should write."""

import json
from random import Random
from typing import Any

from calls import wording
from knowledge import Knowledge
from wording import SYLLABLES


def invented(random: Random) -> str:
    """Return a word that is no word, to be copied letter by letter."""
    return "".join(random.choices(SYLLABLES, k=random.randint(2, 3))).capitalize()


def draw_person(knowledge: Knowledge, random: Random, *, held_out: bool = False) -> list[str | int]:
    """Return a name, a city and an age; the first two from the held-out lists where asked."""
    words, end = wording()[knowledge.language], "_held_out" * held_out
    english = knowledge.language == "en"
    first, last, city = (random.choice(words[key + end]) for key in ("first", "last", "city"))
    if not held_out:
        letters = [letter for name in (*words["first"], *words["city"]) for letter in name]
        if random.random() < 0.35:
            first = invented(random) if english else "".join(random.choices(letters, k=random.randint(1, 2)))
        if random.random() < 0.25:
            last = invented(random) if english else random.choice(letters)
        if random.random() < 0.35:
            city = invented(random) if english else "".join(random.choices(letters, k=2))
        if english and random.random() < 0.3:
            return [first, city, random.randint(1, 99)]
    name = f"{first} {last}" if english else last + first
    if not held_out and (name[1:] in words["first_held_out"] or city in words["city_held_out"]):
        return draw_person(knowledge, random)
    return [name, city, random.randint(1, 99)]


def listed(fields: list[str], knowledge: Knowledge, random: Random) -> str:
    """Return the fields as a list in a sentence."""
    if knowledge.language == "zh":
        return "、".join(fields)
    if random.random() < 0.2:
        return ", ".join(fields[:-1]) + " and " + fields[-1]
    return ", ".join(fields)


def draw_form(knowledge: Knowledge, random: Random, *, held_out: bool = False) -> tuple[str, dict[str, Any]]:
    """Return a request to fill a form of two or three fields in any order, and the filled form."""
    words, end = wording()[knowledge.language], "_held_out" * held_out
    person = draw_person(knowledge, random, held_out=held_out)
    told = random.choice(words["told" + end])
    for mark, value in zip(("{n}", "{c}", "{g}"), person, strict=True):
        told = told.replace(mark, str(value))
    form = dict(zip(random.choice(words["fields"]), person, strict=True))
    if random.random() < 0.5:
        keys = random.sample(list(form), random.choice((2, 3)))
        form = {key: form[key] for key in keys}
    request = random.choice(words["form" + end]).replace("{f}", listed(list(form), knowledge, random))
    return request.replace("{t}", told), form


def form_text(form: dict[str, Any]) -> str:
    """Return the form as the model should write it."""
    return json.dumps(form, ensure_ascii=False)
