"""The blocks of the paged cache: how many hold each, which may be taken next, which remember a text.

::

    head -> plain <-> plain <-> cached <-> cached <-> cached -> (head)        fresh, fresh, fresh ...
            taken first         least recently used first                     never taken: no memory yet

Free blocks that were taken before stand in one ring. A *plain* block remembers nothing and is put in front. A *cached*
block still carries the hash of the text whose keys and values it holds; it is put at the back and forgets only when it
is taken. *Fresh* blocks cost no memory until they are written. So plain blocks are taken first; then fresh ones up to
`soft_limit`; then the least recently used of the cached; and fresh ones beyond it only when nothing else is free: a
prefix cache alone takes no more memory than the limit.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain


def require(holds: bool, statement: str) -> None:
    """State an invariant.

    Raises:
        AssertionError: it does not hold: a fault of the engine, never of a user.
    """
    if not holds:
        raise AssertionError(f"broken invariant: {statement}")


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, with reference counts and the map from hash to block.

    Taking, releasing and sharing one block are O(1). The ring is kept in two lists of indices; index
    `num_blocks` is its head and no block.

    Args:
        soft_limit: blocks that may have memory before cached ones are evicted; None: all.
    """

    def __init__(self, num_blocks: int, block_size: int, soft_limit: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.soft_limit = num_blocks if soft_limit is None else min(soft_limit, num_blocks)
        self.clear()

    def clear(self) -> None:
        """Forget all holders and contents, in whatever state they are."""
        self.num_touched = 0
        """Blocks below this number were taken and may have memory; the others are fresh."""
        self.num_free = self.num_blocks
        """Blocks that can be taken, cached and fresh ones included."""
        self.num_cached = 0
        """Free blocks that carry a hash."""
        self._next = [self.num_blocks] * (self.num_blocks + 1)
        self._previous = list(self._next)
        self._num_holders = [0] * self.num_blocks
        self._hash_of: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` need."""
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int) -> list[int]:
        """Hold so many free blocks; what they remembered is forgotten. Raises AssertionError where there are fewer."""
        if num_blocks > self.num_free:
            raise AssertionError(f"{num_blocks} blocks wanted, {self.num_free} free")
        taken = []
        for _ in range(num_blocks):
            block_id = self._next[self.num_blocks]
            if self._prefers_fresh(block_id):
                block_id = self.num_touched
                self.num_touched += 1
                self.num_free -= 1
            else:
                self._unlink(block_id)
                self._forget(block_id)
            self._num_holders[block_id] = 1
            taken.append(block_id)
        return taken

    def _prefers_fresh(self, first: int) -> bool:
        """Whether a fresh block is taken, and not the first of the ring."""
        if first == self.num_blocks:
            return True
        return self._hash_of[first] is not None and self.num_touched < self.soft_limit

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder for each block, whether others hold it or it is free and cached."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                self._unlink(block_id)
            self._num_holders[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each block of a sequence.

        The last block goes first, so that the end of a text is evicted before its beginning, without
        which the end could not be found.
        """
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._link(block_id)

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, so that sharing them lowers `num_free`."""
        return sum(self._num_holders[block_id] == 0 for block_id in block_ids)

    def remember(self, block_id: int, block_hash: bytes) -> None:
        """Note what a held block contains. The first block with a hash keeps it."""
        if self._block_of.setdefault(block_hash, block_id) == block_id:
            self._hash_of[block_id] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        """The block that has this content, held or free. True until the next `take` or `forget`."""
        return self._block_of.get(block_hash)

    def forget(self, block_ids: Iterable[int]) -> None:
        """The content of these blocks is in doubt: no request finds them again. Requests that hold them keep them."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0 and self._hash_of[block_id] is not None:  # free: it becomes plain
                self._unlink(block_id)
                self._forget(block_id)
                self._link(block_id)
            else:
                self._forget(block_id)

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            self._hash_of[block_id] = None
            del self._block_of[block_hash]

    def _unlink(self, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1
        self.num_cached -= self._hash_of[block_id] is not None

    def _link(self, block_id: int) -> None:
        head = self.num_blocks
        cached = self._hash_of[block_id] is not None
        before = self._previous[head] if cached else head
        after = self._next[before]
        self._next[before] = self._previous[after] = block_id
        self._previous[block_id], self._next[block_id] = before, after
        self.num_free += 1
        self.num_cached += cached

    def give_back(self, *, keeps_cached: bool) -> list[tuple[int, int]]:
        """Runs `(first block, number)` of free blocks without content, whose memory may be given back.

        Args:
            keeps_cached: cached blocks keep their content, as far as they are below the soft limit; False: all forget.
        """
        num_kept = min(self.num_cached, self.soft_limit) if keeps_cached else 0
        self.forget(self._ring()[self.num_free - self._num_fresh - self.num_cached :][: self.num_cached - num_kept])
        runs: list[tuple[int, int]] = []
        for block_id in sorted(self._ring()[: self.num_free - self._num_fresh - self.num_cached]):
            first, number = runs[-1] if runs else (-1, 0)
            if first + number == block_id:
                runs[-1] = first, number + 1
            else:
                runs.append((block_id, 1))
        if runs and sum(runs[-1]) == self.num_touched:  # what ends the touched ones is as good as fresh
            for block_id in range(runs[-1][0], self.num_touched):
                self._unlink(block_id)
                self.num_free += 1
            self.num_touched = runs[-1][0]
        return runs

    @property
    def _num_fresh(self) -> int:
        return self.num_blocks - self.num_touched

    def _ring(self) -> list[int]:
        blocks: list[int] = []
        block_id = self._next[self.num_blocks]
        while block_id != self.num_blocks and len(blocks) <= self.num_blocks:
            blocks.append(block_id)
            block_id = self._next[block_id]
        return blocks

    def free_blocks(self) -> list[int]:
        """The free blocks in the order in which they would be taken."""
        ring, fresh = self._ring(), range(self.num_touched, self.num_blocks)
        first = next((place for place, block_id in enumerate(ring) if self._hash_of[block_id] is not None), len(ring))
        room = max(0, self.soft_limit - self.num_touched)
        return [*ring[:first], *fresh[:room], *ring[first:], *fresh[room:]]

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """State what is always true; `holders` are the block tables of all requests that hold blocks. Costs as much as
        there are blocks that were touched."""
        ring, touched = self._ring(), range(self.num_touched)
        held = Counter(chain.from_iterable(holders))
        cached = [self._hash_of[block_id] is not None for block_id in ring]
        remembered = {known: number for number in touched if (known := self._hash_of[number]) is not None}
        links = [*ring, self.num_blocks]
        require(len(set(ring)) == len(ring) == self.num_free - self._num_fresh, "the ring holds each free block once")
        require(all(self._previous[self._next[link]] == link for link in links), "the ring is whole")
        counts = Counter({number: self._num_holders[number] for number in touched})
        require(held == counts, "every count equals its holders")
        require(not held.keys() & set(ring), "no held block is free")
        require(len(ring) + len(held) == self.num_touched, "free, cached and held are all blocks that were touched")
        require(cached == sorted(cached), "plain blocks are taken before cached ones")
        require(sum(cached) == self.num_cached, "the number of cached blocks is right")
        require(remembered == self._block_of, "the hash maps are inverse to each other")
