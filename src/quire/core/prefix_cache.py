"""Finds computed blocks by the text that led to them.

The hash of a full block covers its tokens and the hash of the block before it, back to a root that covers
the cache salt: equal hashes mean equal text from the first token on, hence equal keys and values.
Hashes are BLAKE2b of 256 bits, keyed: a caller that does not know the key cannot look for a collision and so
cannot be served another's memory. No result depends on the key.
"""

from array import array
from hashlib import blake2b
from typing import NamedTuple

from quire.core.block_pool import BlockPool
from quire.core.request import Request

_DIGEST_BYTES = 32


class PrefixMatch(NamedTuple):
    """What was looked up in the cache, and what it had."""

    num_tokens_queried: int
    block_ids: list[int]
    """Blocks of the beginning of the text, not yet held. True until the pool changes."""


class PrefixCache:
    """Reads and writes block hashes in a pool. `key` has 16 to 64 bytes and is secret."""

    def __init__(self, key: bytes) -> None:
        if not 16 <= len(key) <= blake2b.MAX_KEY_SIZE:
            raise ValueError(f"the key of the prefix cache has {len(key)} bytes; it needs 16 to 64")
        self._key = key

    def match(self, request: Request, pool: BlockPool) -> PrefixMatch:
        """The longest chain of blocks that holds the beginning of the request's tokens.

        Never all of them: at least the last token is computed, because its logits are needed. A request for the
        log-probabilities of its prompt needs those logits as well, and shares only the blocks before the first
        position that was not yet sent.
        """
        limit = len(request.token_ids) - 1
        if request.num_prompt_logprobs_due:
            limit = request.num_prompt_logprobs_sent
        num_blocks = limit // pool.block_size
        found: list[int] = []
        for index in range(num_blocks):
            block_id = pool.find(self._hash(request, index, pool.block_size))
            if block_id is None:
                break
            found.append(block_id)
        return PrefixMatch(num_blocks * pool.block_size, found)

    def register(self, request: Request, pool: BlockPool, start: int, end: int) -> None:
        """Tokens `[start, end)` are scheduled: the blocks that they fill can be found from now on."""
        for index in range(start // pool.block_size, end // pool.block_size):
            pool.remember(request.block_ids[index], self._hash(request, index, pool.block_size))

    def _hash(self, request: Request, index: int, block_size: int) -> bytes:
        """The hash of full block `index`; each is computed once in the life of a request."""
        hashes = request.block_hashes
        while len(hashes) <= index:
            first = len(hashes) * block_size
            parent = hashes[-1] if hashes else self._root(request.new.cache_salt)
            tokens = array("I", request.token_ids[first : first + block_size])
            hashes.append(self._digest(parent + tokens.tobytes(), b"block"))
        return hashes[index]

    def _root(self, cache_salt: str) -> bytes:
        return self._digest(cache_salt.encode("utf-8", "surrogatepass"), b"salt")

    def _digest(self, data: bytes, kind: bytes) -> bytes:
        """`kind` keeps a salt from posing as a block."""
        return blake2b(data, digest_size=_DIGEST_BYTES, key=self._key, person=kind).digest()


class NullPrefixCache:
    """Prefix caching switched off: finds nothing, keeps nothing."""

    def match(self, request: Request, pool: BlockPool) -> PrefixMatch:
        """Nothing is looked up and nothing found."""
        return PrefixMatch(0, [])

    def register(self, request: Request, pool: BlockPool, start: int, end: int) -> None:
        """No block is remembered."""
