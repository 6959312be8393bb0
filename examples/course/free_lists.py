"""Two managers of cache blocks: one that takes from the front of a list, as teaching code does, and Quire's pool."""

import time
from collections.abc import Callable

from quire.core.block_pool import BlockPool


class ListManager:
    """Free blocks in a list: short, and slow where it looks harmless."""

    def __init__(self, num_blocks: int) -> None:
        self.free_blocks = list(range(num_blocks))

    def allocate(self, number: int) -> list[int]:
        """Take blocks from the front; each `pop(0)` moves all that are behind it."""
        taken = []
        for _ in range(number):
            if not self.free_blocks:
                raise MemoryError("the cache is full")
            taken.append(self.free_blocks.pop(0))
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back, at the end."""
        self.free_blocks.extend(blocks)


def nanoseconds_a_block(
    take: Callable[[int], list[int]], give_back: Callable[[list[int]], None], rounds: int = 200, number: int = 32
) -> float:
    """Of taking `number` blocks and giving them back, the fastest of five tries."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter_ns()
        for _ in range(rounds):
            give_back(take(number))
        best = min(best, (time.perf_counter_ns() - start) / (rounds * number))
    return best


print(f"{'blocks':>10}  {'list.pop(0)':>14}  {'BlockPool':>14}     (ns to take and give back one)")
for num_blocks in (1_000, 10_000, 100_000, 1_000_000):
    manager, pool = ListManager(num_blocks), BlockPool(num_blocks, block_size=16)
    slow = nanoseconds_a_block(manager.allocate, manager.free, rounds=200 if num_blocks < 500_000 else 2)
    print(f"{num_blocks:>10,}  {slow:>14,.0f}  {nanoseconds_a_block(pool.take, pool.release):>14,.0f}")

manager = ListManager(8)
held = manager.allocate(5)
try:
    manager.allocate(5)
except MemoryError:
    manager.free(held)
    print(f"8 blocks, 5 held, 5 more refused, the 5 given back: {len(manager.free_blocks)} are free")

pool = BlockPool(8, block_size=16)
held = pool.take(5)
if pool.num_free < 5:  # `take` has to be asked for no more than are free: the scheduler looks first
    pool.release(held)
    print(f"the same with BlockPool: {pool.num_free} are free")
