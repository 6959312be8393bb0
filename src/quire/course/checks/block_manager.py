"""Checks of exercise 2.1: random calls beside a model of plain sets and lists, then the number of steps.

`quire.core.block_pool` is tested in the same way (tests/core/test_block_pool.py).
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from quire.course.checking import Check, Failed, said, shorter, shown, smallest
from quire.course.counted import Work, load_counted

NUM_BLOCKS = 5
NUM_ROUNDS = 200
LONGEST = 30
SIZES = (32, 1024)
"""Numbers of blocks between which the steps may not grow."""
MOST_GROWTH = 3.0
NUM_COUNTED = 40
CONTENTS = tuple(b"%c" % letter for letter in b"abcdefg")
Call = tuple[str, int, int]
"""A name, and two numbers that say which of what there is."""


class _Beside:
    """A manager, and what it should be."""

    def __init__(self, module: ModuleType, exact: bool, remembers: bool) -> None:
        self._path = str(module.__file__)
        self._remembers = remembers
        self._exact = exact
        """Whether it matters which block is taken."""
        self._calls: list[str] = [f"BlockManager({NUM_BLOCKS}, 16)"]
        self._tables: list[list[int]] = []
        self._block_of: dict[bytes, int] = {}
        self._plain = set(range(NUM_BLOCKS))
        self._cached: list[int] = []
        """Free and remembered, in the order in which they were freed."""
        self._manager: Any = self._ask("", lambda: module.BlockManager(NUM_BLOCKS, 16))

    def run(self, calls: Sequence[Call]) -> None:
        """Raise `Failed` at the first difference."""
        self._compare()
        for name, first, second in calls:
            if getattr(self, f"_{name}")(first, second):
                self._compare()

    def _ask(self, call: str, asked: Any) -> Any:
        if call:
            self._calls.append(call)
        try:
            return asked()
        except Exception as error:
            raise Failed(f"{self._so_far()}: {said(error, self._path)}") from error

    def _so_far(self) -> str:
        return "; ".join(self._calls)

    def _wrong(self, text: str) -> Failed:
        return Failed(f"{self._so_far()}: {text}")

    def _compare(self) -> None:
        free = self._plain | set(self._cached)
        num_free = self._ask("", lambda: self._manager.num_free)
        if num_free != len(free):
            raise self._wrong(f"num_free is {shown(num_free)}, expected {len(free)}: blocks {sorted(free)} are free")
        for block_hash in CONTENTS if self._remembers else ():
            wanted = self._block_of.get(block_hash)
            found = self._ask("", lambda asked=block_hash: self._manager.find(asked))
            if found != wanted:
                raise self._wrong(f"find({block_hash!r}) is {shown(found)}, expected {wanted}")

    def _take(self, count: int, _: int) -> bool:
        count = count % (len(self._plain) + len(self._cached) + 1)
        taken = self._ask(f"take({count})", lambda: self._manager.take(count))
        if not isinstance(taken, list) or not all(type(one) is int for one in taken):
            raise self._wrong(f"it gave {shown(taken)}, expected a list of block numbers")
        self._calls[-1] += f" -> {taken}"
        if len(taken) != count or len(set(taken)) != count:
            raise self._wrong(f"expected {count} different blocks")
        free = self._plain | set(self._cached)
        if not free.issuperset(taken):
            raise self._wrong(f"block {min(set(taken) - free)} is not free: free are {sorted(free)}")
        num_cached = max(0, count - len(self._plain))
        wanted = set(self._cached[:num_cached])
        if self._exact and set(taken) - self._plain != wanted:
            order = f"{sorted(self._plain)} remember nothing, then {self._cached} in the order they were freed"
            raise self._wrong(f"of the free blocks {order}: wrong ones were taken")
        self._plain -= set(taken)
        self._cached = [one for one in self._cached if one not in taken]
        self._block_of = {known: one for known, one in self._block_of.items() if one not in taken}
        self._tables.append(taken)
        return True

    def _take_too_many(self, more: int, _: int) -> bool:
        count = len(self._plain) + len(self._cached) + 1 + more % 3
        self._calls.append(f"take({count})")
        try:
            taken = self._manager.take(count)
        except Exception as error:  # noqa: BLE001 - any will do
            self._calls[-1] += f" raises {type(error).__name__}"
            return True
        raise self._wrong(f"it gave {shown(taken)}, expected an exception: {count - 1 - more % 3} blocks are free")

    def _release(self, place: int, _: int) -> bool:
        if not self._tables:
            return False
        table = self._tables.pop(place % len(self._tables))
        self._ask(f"release({table})", lambda: self._manager.release(list(table)))
        for block_id in reversed(table):
            if not any(block_id in other for other in self._tables):
                if block_id in self._block_of.values():
                    self._cached.append(block_id)
                else:
                    self._plain.add(block_id)
        return True

    def _share(self, place: int, count: int) -> bool:
        """Remembered blocks, as a new sequence would find them, or those of a sequence that forks."""
        known = sorted(self._block_of.values())
        if known:
            table = [known[(place + i) % len(known)] for i in range(1 + count % len(known))]
        elif self._tables and not self._exact:
            table = list(self._tables[place % len(self._tables)])
        else:
            return False
        self._ask(f"share({table})", lambda: self._manager.share(list(table)))
        self._plain -= set(table)
        self._cached = [one for one in self._cached if one not in table]
        self._tables.append(table)
        return True

    def _remember(self, place: int, content: int) -> bool:
        held = sorted({one for table in self._tables for one in table} - set(self._block_of.values()))
        if not held:
            return False
        block_id, block_hash = held[place % len(held)], CONTENTS[content % len(CONTENTS)]
        self._ask(f"remember({block_id}, {block_hash!r})", lambda: self._manager.remember(block_id, block_hash))
        self._block_of.setdefault(block_hash, block_id)
        return True


def _smaller(calls: list[Call]) -> Iterator[list[Call]]:
    yield from shorter(calls)
    for place, (name, first, second) in enumerate(calls):
        for number in (0, 1, first // 2):
            if number < first:
                yield [*calls[:place], (name, number, second), *calls[place + 1 :]]


def _random_calls(module: ModuleType, names: Sequence[str], exact: bool = False) -> str:
    def problem(calls: list[Call]) -> str | None:
        try:
            _Beside(module, exact, "remember" in names).run(calls)
        except Failed as error:
            return str(error)
        return None

    rng = random.Random(0)
    for number in range(NUM_ROUNDS):
        length = 1 + number * LONGEST // NUM_ROUNDS
        calls = [(rng.choice(names), rng.randrange(60), rng.randrange(60)) for _ in range(length)]
        text = smallest(calls, _smaller, problem)
        if text is not None:
            raise Failed(text)
    return f"{NUM_ROUNDS} random sequences of calls"


def taken_and_released(module: ModuleType) -> str:
    """take gives free blocks, each once; release frees them"""
    return _random_calls(module, ("take", "release"))


def too_many(module: ModuleType) -> str:
    """take of more than are free is refused and changes nothing"""
    return _random_calls(module, ("take", "release", "take_too_many"))


def shared(module: ModuleType) -> str:
    """a shared block is free when its last holder releases it"""
    return _random_calls(module, ("take", "release", "share"))


def remembered(module: ModuleType) -> str:
    """content is found until its block is taken; the first block with it keeps it"""
    return _random_calls(module, ("take", "release", "share", "remember", "remember"))


def evicted(module: ModuleType) -> str:
    """what remembers nothing is taken first, then what was freed longest ago"""
    return _random_calls(module, ("take", "release", "share", "remember", "remember", "take_too_many"), exact=True)


def cheap(module: ModuleType) -> str:
    """the steps of a block do not grow with the number of blocks"""
    small, large = ({name: _steps(module, name, size) for name in SITUATIONS} for size in SIZES)
    for name in SITUATIONS:
        if large[name].total > MOST_GROWTH * small[name].total:
            costly = Counter(large[name].items) - Counter(small[name].items)
            most = "; most of them in " + costly.most_common(1)[0][0] if costly else ""
            raise Failed(
                f"{NUM_COUNTED} rounds of take, remember, find, share and release {SITUATIONS[name]} take "
                f"{small[name].total:,} steps of {SIZES[0]} blocks and {large[name].total:,} of {SIZES[1]:,}{most}"
            )
    totals = [f"{sum(work.total for work in found.values()):,}" for found in (small, large)]
    return f"{totals[0]} steps of {SIZES[0]} blocks, {totals[1]} of {SIZES[1]:,}"


SITUATIONS = {
    "empty": "while all other blocks are free",
    "remembered": "while all other blocks are free and remembered",
    "full": "while all other blocks are held",
}


def _steps(module: ModuleType, situation: str, num_blocks: int) -> Work:
    work = Work(str(module.__file__))
    manager = load_counted(module, work).BlockManager(num_blocks, 16)
    if situation != "empty":
        table = list(manager.take(num_blocks if situation == "remembered" else num_blocks - 4))
        if situation == "remembered":
            for block_id in table:
                manager.remember(block_id, b"old%d" % block_id)
            manager.release(table)
    with work:
        for number in range(NUM_COUNTED):
            table = list(manager.take(2))
            manager.remember(table[0], b"new%d" % number)
            found = manager.find(b"new%d" % number)
            manager.share([found])
            manager.release([found])
            manager.release(table)
            if manager.num_free < 0:
                raise Failed("num_free is negative")
    return work


CHECKS: tuple[Check, ...] = (taken_and_released, too_many, shared, remembered, evicted, cheap)
