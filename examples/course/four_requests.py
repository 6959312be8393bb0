"""Static and continuous batches of the same requests, drawn: a row is a slot of the batch, a letter is a request."""

LENGTHS = {"A": 100, "B": 50, "C": 50, "D": 50, "E": 50, "F": 50, "G": 50}
"""Tokens that each request generates; a step of the batch generates one for each slot that is in use."""
SLOTS, STEPS_A_LETTER = 4, 5


def static(lengths: dict[str, int]) -> list[str]:
    """A batch starts when the one before it has ended, and ends with its longest request."""
    waiting, slots = list(lengths), [""] * SLOTS
    while waiting:
        batch, waiting = waiting[:SLOTS], waiting[SLOTS:]
        longest = max(lengths[name] for name in batch)
        for slot, name in enumerate([*batch, *" " * (SLOTS - len(batch))]):
            slots[slot] += (name * lengths.get(name, 0)).ljust(longest, ".")
    return slots


def continuous(lengths: dict[str, int]) -> list[str]:
    """A request starts in the step in which a slot is free."""
    slots = [""] * SLOTS
    for name, length in lengths.items():
        slots[min(range(SLOTS), key=lambda slot: len(slots[slot]))] += name * length
    return [slot.ljust(max(map(len, slots)), ".") for slot in slots]


for title, slots in (("static", static(LENGTHS)), ("continuous", continuous(LENGTHS))):
    steps, tokens = len(slots[0]), sum(LENGTHS.values())
    print(f"{title}: {tokens} tokens in {steps} steps, {tokens / (steps * SLOTS):.1%} of the slots in use")
    for slot in slots:
        print("  |" + slot[::STEPS_A_LETTER] + "|")
