"""The block pool: exact cases, then a state machine against an oracle of plain sets and lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.core.block_pool import BlockPool


def test_plain_blocks_are_taken_in_order_then_again() -> None:
    pool = BlockPool(4, 16)
    assert pool.take(3) == [0, 1, 2]
    pool.release([0, 1, 2])
    assert pool.take(2) == [0, 1]  # what was touched is used again before block 3 is
    assert (pool.num_free, pool.num_cached) == (2, 0)


def test_cached_blocks_are_evicted_last_and_oldest_first() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.take(1), pool.take(2)
    for block_id, block_hash in [(first[0], b"a"), (second[0], b"b"), (second[1], b"c")]:
        pool.remember(block_id, block_hash)
    pool.release(first)
    pool.release(second)
    assert (pool.num_free, pool.num_cached) == (4, 3)
    assert pool.free_blocks() == [3, 0, 2, 1]  # plain, then oldest; the end of a text before its beginning
    assert pool.take(3) == [3, 0, 2]
    assert [pool.find(block_hash) for block_hash in (b"a", b"b", b"c")] == [None, 1, None]
    pool.check([[3, 0, 2]])


def test_a_hit_pulls_the_block_out_of_the_ring() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.take(1)
    pool.remember(block_ids[0], b"a")
    pool.release(block_ids)
    assert pool.num_unheld(block_ids) == 1
    pool.share(block_ids)
    pool.share(block_ids)
    assert (pool.num_free, pool.num_cached, pool.num_unheld(block_ids)) == (1, 0, 0)
    pool.release(block_ids)
    assert pool.num_free == 1
    pool.release(block_ids)
    assert (pool.num_free, pool.num_cached, pool.find(b"a")) == (2, 1, 0)


def test_the_first_block_with_a_hash_keeps_it() -> None:
    pool = BlockPool(2, 16)
    pool.take(2)
    pool.remember(1, b"a")
    pool.remember(0, b"a")
    assert pool.find(b"a") == 1
    pool.forget([0, 1])
    assert pool.find(b"a") is None
    pool.check([[0], [1]])


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(2, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_taking_too_many_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.take(3)
    pool.check([])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda pool: pool._num_holders.__setitem__(0, 2),
        lambda pool: pool._hash_of.__setitem__(0, b"x"),
        lambda pool: pool._block_of.__setitem__(b"x", 0),
        lambda pool: pool._next.__setitem__(1, 1),
        lambda pool: pool._previous.__setitem__(2, 3),
        lambda pool: setattr(pool, "num_cached", 1),
        lambda pool: setattr(pool, "num_free", 1),
        lambda pool: setattr(pool, "num_touched", 3),
    ],
)
def test_check_sees_what_is_broken(break_it) -> None:
    pool = BlockPool(4, 16)
    pool.take(4)
    pool.release([1, 2, 3])
    pool.check([[0]])
    break_it(pool)
    with pytest.raises(AssertionError, match="broken invariant"):
        pool.check([[0]])


def test_beyond_the_soft_limit_cached_blocks_are_evicted_before_memory_is_touched() -> None:
    """Texts that come and go, each remembered, take no more blocks than the limit; requests may hold more."""
    pool = BlockPool(100, 16, soft_limit=6)
    for number in range(50):
        table = pool.take(2)
        for block_id in table:
            pool.remember(block_id, b"%d/%d" % (number, block_id))
        pool.release(table)
    assert (pool.num_touched, pool.num_cached, pool.num_free) == (6, 6, 100)
    held = pool.take(20)
    assert pool.num_touched == 20 and sorted(held) == list(range(20))


def test_what_is_given_back_is_what_nothing_needs() -> None:
    pool = BlockPool(10, 16, soft_limit=4)
    old, new, loose, held = pool.take(3), pool.take(2), pool.take(1), pool.take(1)
    for block_id in (*old, *new):
        pool.remember(block_id, b"%d" % block_id)
    pool.release(old)
    pool.release(new)
    pool.release(loose)
    assert pool.give_back(keeps_cached=True) == [(2, 1), (5, 1)], "the oldest beyond the limit, and the plain one"
    assert (pool.num_cached, pool.num_touched, pool.find(b"2"), pool.find(b"4")) == (4, 7, None, 4)
    assert pool.give_back(keeps_cached=False) == [(0, 6)] and pool.num_touched == 7, "block 6 is held"
    pool.release(held)
    assert pool.give_back(keeps_cached=False) == [(0, 7)]
    assert (pool.num_touched, pool.num_free, pool.free_blocks()) == (0, 10, list(range(10)))
    pool.check([])


class PoolMachine(RuleBasedStateMachine):
    """The oracle keeps the free lists as lists, counts as a list of tables, hashes as a dict."""

    NUM_BLOCKS = 7
    SOFT_LIMIT = 4

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS, 16, self.SOFT_LIMIT)
        self.tables: list[list[int]] = []
        self.hashes: dict[int, bytes] = {}
        self.plain: list[int] = []
        self.cached: list[int] = []
        self.fresh = list(range(self.NUM_BLOCKS))
        self.num_hashes = 0

    @rule(count=st.integers(0, NUM_BLOCKS))
    def take(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(AssertionError):
                self.pool.take(count)
            return
        expected = []
        for _ in range(count):
            block_id = self.free[0]
            for blocks in (self.plain, self.cached, self.fresh):
                if block_id in blocks:
                    blocks.remove(block_id)
            expected.append(block_id)
        assert self.pool.take(count) == expected
        for block_id in expected:
            self.hashes.pop(block_id, None)
        self.tables.append(expected)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block_id in reversed(table):
            if not any(block_id in other for other in self.tables):
                if block_id in self.hashes:
                    self.cached.append(block_id)
                else:
                    self.plain.insert(0, block_id)

    @precondition(lambda self: self.hashes)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.lists(st.sampled_from(sorted(self.hashes)), min_size=1, unique=True))
        held = {block_id for other in self.tables for block_id in other}
        assert self.pool.num_unheld(table) == len(set(table) - held)
        self.pool.share(table)
        self.cached = [block_id for block_id in self.cached if block_id not in table]
        self.tables.append(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), known=st.booleans())
    def remember(self, data: st.DataObject, known: bool) -> None:
        """A held block without a hash becomes full: with new content, or with what another block has."""
        held = sorted({block_id for table in self.tables for block_id in table} - self.hashes.keys())
        if not held:
            return
        block_id = data.draw(st.sampled_from(held))
        if known and self.hashes:
            self.pool.remember(block_id, data.draw(st.sampled_from(sorted(self.hashes.values()))))
            return
        self.hashes[block_id] = b"%d" % self.num_hashes
        self.num_hashes += 1
        self.pool.remember(block_id, self.hashes[block_id])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.forget(table)
        for block_id in table:
            self.hashes.pop(block_id, None)

    @rule(keeps_cached=st.booleans())
    def give_back(self, keeps_cached: bool) -> None:
        num_lost = max(0, len(self.cached) - self.SOFT_LIMIT) if keeps_cached else len(self.cached)
        lost, self.cached = self.cached[:num_lost], self.cached[num_lost:]
        for block_id in lost:
            self.plain.insert(0, block_id)
            del self.hashes[block_id]
        runs = self.pool.give_back(keeps_cached=keeps_cached)
        assert [first + place for first, number in runs for place in range(number)] == sorted(self.plain)
        while self.plain and max(self.plain) == self.NUM_BLOCKS - len(self.fresh) - 1:
            self.fresh.insert(0, max(self.plain))
            self.plain.remove(max(self.plain))

    @property
    def free(self) -> list[int]:
        """In the order in which they would be taken."""
        room = max(0, self.SOFT_LIMIT - (self.NUM_BLOCKS - len(self.fresh)))
        return self.plain + self.fresh[:room] + self.cached + self.fresh[room:]

    @invariant()
    def agrees(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.free_blocks() == self.free
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == len(self.cached)
        for number in range(self.num_hashes):
            found = [block_id for block_id, known in self.hashes.items() if known == b"%d" % number]
            assert self.pool.find(b"%d" % number) == (found[0] if found else None)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
