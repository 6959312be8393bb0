"""Exercise 2.1: a block manager. Check it with `quire course check 2.1`.

Memory for keys and values is `num_blocks` blocks of `block_size` tokens, numbered from 0. A block has as many holders
as sequences use it; without any it is free. A full block can be remembered by a hash of its text, so that a later
sequence with the same beginning shares it instead of computing it again. These are the names of Quire's own
`quire.core.block_pool.BlockPool`, which passes the same checks. vLLM's `BlockPool` (`vllm/v1/core/block_pool.py`) calls
`take` `get_new_blocks`, `release` `free_blocks`, `share` `touch`, `remember` `cache_full_blocks` and `find`
`get_cached_block`.

Write `take` and `release` first: the first two checks need no more.
"""

from collections.abc import Sequence


class BlockManager:
    """Blocks with reference counts, and the map from hash to block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        raise NotImplementedError

    @property
    def num_free(self) -> int:
        """Blocks without a holder, those that are remembered included."""
        raise NotImplementedError

    def take(self, num_blocks: int) -> list[int]:
        """Hold so many free blocks, each with one holder, and forget what they remembered.

        First come blocks that remember nothing, in any order; then, of those that do, the one that was freed longest
        ago. Where fewer are free, raise an exception (`MemoryError`, say) and change nothing.
        """
        raise NotImplementedError

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each block of a sequence; a block without any is free.

        The last block goes first: it counts as freed longest ago, so that the end of a text is forgotten before its
        beginning, without which the end could not be found. A free block keeps what it remembers until it is taken.
        """
        raise NotImplementedError

    def share(self, block_ids: Sequence[int]) -> None:
        """One more holder for each block; a free one is free no more. What they remember stays."""
        raise NotImplementedError

    def remember(self, block_id: int, block_hash: bytes) -> None:
        """Note what a held block contains. The first block with a hash keeps it: others with the same stay plain."""
        raise NotImplementedError

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, held or free; None where there is none."""
        raise NotImplementedError


# The last check counts steps: what a block costs may not grow with the number of blocks. `list.pop(0)` moves all items
# behind it, `in` and `remove` of a list look at them one by one; so do loops over all blocks.
