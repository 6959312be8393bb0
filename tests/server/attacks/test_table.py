"""docs/guide/trust.md names tests that exist, and every class that applies."""

import re

from scripts.house.tree import ROOT

WAITING = {26}


def test_every_test_of_the_table_exists() -> None:
    text = (ROOT / "docs/guide/trust.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 35
    for path, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            path,
            name,
        )


def test_every_class_is_in_the_table_or_waits_for_its_part() -> None:
    text = (ROOT / "docs/guide/trust.md").read_text(encoding="utf-8")
    table, _, waiting = text.partition("\nWaiting for")
    rows = "".join(line for line in table.splitlines() if line.startswith("|"))
    found = {int(number) for number in re.findall(r"\bA(\d\d)\b", rows)}
    assert found == set(range(1, 31)) - WAITING
    assert all(f"A{number:02}" in waiting for number in WAITING)
