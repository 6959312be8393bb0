from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.plain = list(range(num_blocks))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.holders = [0] * num_blocks
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.plain) + len(self.cached)

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks > self.num_free:
            raise MemoryError(f"{num_blocks} blocks wanted, {self.num_free} free")
        taken = []
        for _ in range(num_blocks):
            if self.plain:
                block_id = self.plain.pop()
            else:
                block_id, _ = self.cached.popitem(last=False)
                del self.block_of[self.hash_of.pop(block_id)]
            self.holders[block_id] = 1
            taken.append(block_id)
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            self.holders[block_id] -= 1
            if self.holders[block_id] == 0:
                if block_id in self.hash_of:
                    self.cached[block_id] = None
                else:
                    self.plain.append(block_id)

    def share(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self.holders[block_id] == 0:
                del self.cached[block_id]
            self.holders[block_id] += 1

    def remember(self, block_id: int, block_hash: bytes) -> None:
        if block_hash not in self.block_of:
            self.block_of[block_hash] = block_id
            self.hash_of[block_id] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        return self.block_of.get(block_hash)
