"""For debugging: blocks of the prefix cache are computed again while there is no work, and compared bit for bit.

A block is computed from the cached blocks before it, which were compared before it, so each takes one short step, and a
difference means that this very block is wrong. What was computed from a wrong block cannot be right either: all of that
is forgotten with it.

The log says when all cached blocks have been compared, and when requests have come since, so that they are in doubt.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from quire.core.block_pool import BlockPool, require
from quire.core.prefix_cache import PrefixCache, PrefixMatch
from quire.core.request import Request

logger = logging.getLogger("quire")
FirstDifference = Callable[[Sequence[int], Sequence[int]], int | None]
"""See `ModelRunner.first_difference`."""


class _Text(NamedTuple):
    """Of one full block."""

    parent: bytes
    """The hash of the block before it; empty for the first."""
    token_ids: tuple[int, ...]


class CachedBlockVerifier(PrefixCache):
    """A prefix cache that remembers the texts of its blocks, and the idle work that holds the blocks against them."""

    def __init__(self, key: bytes, first_difference: FirstDifference) -> None:
        super().__init__(key)
        self.num_compared = 0
        self.num_different = 0
        self._first_difference = first_difference
        self._pool: BlockPool | None = None
        self._texts: dict[bytes, _Text] = {}
        """By hash, with those of all blocks before."""
        self._due: list[bytes] = []
        """What is left of a pass over the cached blocks, the next one last. Requests do not break it off."""
        self._is_pass_missing = False
        """A request has come since the last pass began."""
        self._is_in_doubt = False

    def match(self, request: Request, pool: BlockPool) -> PrefixMatch:
        """See `PrefixCache.match`. All work begins with it."""
        if not self._is_in_doubt:
            logger.info("cached blocks are in doubt")
        self._pool, self._is_in_doubt, self._is_pass_missing = pool, True, True
        return super().match(request, pool)

    def register(self, request: Request, pool: BlockPool, start: int, end: int) -> None:
        """See `PrefixCache.register`."""
        super().register(request, pool, start, end)
        size, hashes = pool.block_size, request.block_hashes
        for index in range(start // size, end // size):
            tokens = request.token_ids[index * size : (index + 1) * size]
            self._texts.setdefault(hashes[index], _Text(hashes[index - 1] if index else b"", tuple(tokens)))
        if len(self._texts) > 4 * pool.num_blocks:
            self._drop_texts(pool)

    def do_next(self) -> bool:
        """Compare one block. False: all have been since the last request came."""
        pool = self._pool
        if pool is None or not self._is_in_doubt:
            return False
        while self._due or self._is_pass_missing:
            if not self._due:
                self._begin_pass(pool)
                continue
            block_hash = self._due.pop()
            found = [pool.find(one) for one in self._chain(block_hash)]
            block_ids = [block_id for block_id in reversed(found) if block_id is not None]
            if found and len(block_ids) == len(found):  # else a request cannot find the block either
                self._compare(block_hash, block_ids, pool)
                return True
        self._is_in_doubt = False
        logger.info("cached blocks compared: %d, different: %d", self.num_compared, self.num_different)
        return False

    def check(self) -> None:
        """State that no difference was found."""
        require(self.num_different == 0, f"{self.num_different} of {self.num_compared} cached blocks were wrong")

    def _begin_pass(self, pool: BlockPool) -> None:
        self._is_pass_missing = False
        self._drop_texts(pool)
        parents_first = dict.fromkeys(one for known in self._texts for one in reversed([*self._chain(known)]))
        self._due = list(reversed(parents_first))

    def _compare(self, block_hash: bytes, block_ids: list[int], pool: BlockPool) -> None:
        self.num_compared += 1
        layer = self._first_difference(block_ids, self._texts[block_hash].token_ids)
        if layer is None:
            return
        self.num_different += 1
        logger.error(
            "cached block %d is wrong from layer %d on; it is number %d of its text", block_ids[-1], layer,
            len(block_ids) - 1,
        )  # fmt: skip
        for other in self._texts:
            block_id = pool.find(other)
            if block_id is not None and block_hash in self._chain(other):
                pool.forget([block_id])

    def _chain(self, block_hash: bytes) -> Iterator[bytes]:
        """A block and those before it, back to the first; where a text was dropped, it ends with what no block is."""
        while block_hash:
            yield block_hash
            text = self._texts.get(block_hash)
            if text is None:
                yield b""
                return
            block_hash = text.parent

    def _drop_texts(self, pool: BlockPool) -> None:
        """Of blocks that are cached no more, and are before none that is."""
        kept = {one for known in self._texts if pool.find(known) is not None for one in self._chain(known)}
        self._texts = {known: text for known, text in self._texts.items() if known in kept}
