"""Hash chains: what they cover, and what they cost."""

import random

from quire.core.block_pool import BlockPool
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import Request
from tests.core.harness import KEY, new_request


def request(token_ids: list[int], salt: str = "", **sampling: object) -> Request:
    new = new_request("a", token_ids, salt=salt, **sampling)
    return Request(new, list(token_ids), 0, max_num_tokens=100, stop_token_ids=frozenset())


def computed(cache: PrefixCache, pool: BlockPool, token_ids: list[int], salt: str = "") -> Request:
    done = request(token_ids, salt)
    done.block_ids = pool.take(pool.blocks_for(len(token_ids)))
    cache.register(done, pool, 0, len(token_ids))
    return done


def test_a_block_stands_for_all_text_before_it() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    first = computed(cache, pool, [1, 2, 3, 4, 5])
    second = computed(cache, pool, [9, 9, 3, 4, 5])
    assert cache.match(request([1, 2, 3, 4, 7]), pool).block_ids == first.block_ids[:2]
    assert cache.match(request([9, 9, 3, 4, 7]), pool).block_ids == second.block_ids[:2]
    assert cache.match(request([3, 4, 7]), pool).block_ids == []
    assert cache.match(request([1, 2, 9, 9, 7]), pool).block_ids == first.block_ids[:1]


def test_only_full_blocks_that_were_computed_are_found() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    part = request([1, 2, 3, 4, 5, 6])
    part.block_ids = pool.take(3)
    cache.register(part, pool, 0, 3)
    assert cache.match(request([1, 2, 3, 4, 5]), pool) == (4, part.block_ids[:1])
    cache.register(part, pool, 3, 4)
    assert cache.match(request([1, 2, 3, 4, 5]), pool) == (4, part.block_ids[:2])


def test_matches_are_the_longest_common_beginnings() -> None:
    """Against texts kept as they are: a block stands for its salt and for all tokens up to its end."""
    dice = random.Random(5)
    pool, cache = BlockPool(4000, 2), PrefixCache(KEY)
    texts: dict[tuple[str, tuple[int, ...]], int] = {}
    num_found, before = 0, [0]
    for _ in range(400):
        salt = dice.choice(["", "", "x"])
        token_ids = before[: dice.randint(0, len(before))]
        token_ids += [dice.choice([0, 1, 256, 1 << 16, 1 << 31]) for _ in range(dice.randint(1, 4))]
        before = token_ids
        expected: list[int] = []
        for end in range(2, len(token_ids), 2):
            block_id = texts.get((salt, tuple(token_ids[:end])))
            if block_id is None:
                break
            expected.append(block_id)
        assert cache.match(request(token_ids, salt), pool) == (2 * ((len(token_ids) - 1) // 2), expected)
        num_found += len(expected)
        done = computed(cache, pool, token_ids, salt)
        beginnings = [(salt, tuple(token_ids[:end])) for end in range(2, len(token_ids) + 1, 2)]
        for text, block_id in zip(beginnings, done.block_ids, strict=False):
            texts.setdefault(text, block_id)
        if beginnings and dice.random() < 0.3:  # what comes after it is remembered, and must not be found
            pool.forget([texts.pop(dice.choice(beginnings))])
    assert num_found > 100


def test_salts_and_keys_separate() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    computed(cache, pool, [1, 2, 3], salt="x")
    assert cache.match(request([1, 2, 3], salt="x"), pool).block_ids
    assert not cache.match(request([1, 2, 3]), pool).block_ids
    assert not PrefixCache(bytes(32)).match(request([1, 2, 3], salt="x"), pool).block_ids


def test_a_salt_cannot_pose_as_a_block() -> None:
    """Salt and block digests are of different kinds, whatever bytes they cover."""
    cache = PrefixCache(KEY)
    data = b"the same bytes"
    assert cache._root(data.decode()) == cache._digest(data, b"salt") != cache._digest(data, b"block")


def test_hashes_are_made_once_and_are_long() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    done = computed(cache, pool, [1, 2, 3, 4, 5])
    before = list(done.block_hashes)
    cache.match(done, pool)
    cache.register(done, pool, 0, 5)
    assert all(old is new for old, new in zip(before, done.block_hashes, strict=True))
    assert {len(block_hash) for block_hash in before} == {32}


def test_token_ids_of_any_width_count() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    computed(cache, pool, [1, 0, 0])
    assert not cache.match(request([1 << 31, 0, 0]), pool).block_ids
    assert not cache.match(request([257, 0, 0]), pool).block_ids


def test_a_request_for_prompt_logprobs_reads_what_was_sent() -> None:
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    done = computed(cache, pool, [1, 2, 3, 4, 5])
    wants = request([1, 2, 3, 4, 5], num_prompt_logprobs=1)
    for num_sent, num_blocks in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]:
        wants.num_prompt_logprobs_sent = num_sent
        assert cache.match(wants, pool).block_ids == done.block_ids[:num_blocks]


def test_prompt_logprobs_that_were_sent_hold_back_nothing() -> None:
    """A request that was preempted after its prompt reads all blocks, those of its own tokens as well."""
    pool, cache = BlockPool(16, 2), PrefixCache(KEY)
    done = computed(cache, pool, list(range(9)))
    back = request(list(range(5)), num_prompt_logprobs=1)
    back.token_ids += range(5, 9)
    back.num_prompt_logprobs_sent = 4
    assert cache.match(back, pool).block_ids == done.block_ids[:4]


def test_switched_off_nothing_is_kept() -> None:
    pool, cache = BlockPool(16, 2), NullPrefixCache()
    done = request([1, 2, 3])
    done.block_ids = pool.take(2)
    cache.register(done, pool, 0, 3)
    assert cache.match(request([1, 2, 3]), pool) == (0, [])
    pool.release(done.block_ids)
    assert pool.num_cached == 0
