"""What the scheduler counts: blocks and hits of a record, the usage of the cache, the room that hits take."""

from quire.core.plan import Stalled, TokenDelta
from tests.core.harness import Harness, new_request


def test_the_record_counts_blocks_and_hits() -> None:
    harness = Harness(num_blocks=16, block_size=4)
    harness.add(new_request("a", range(9), max_tokens=1))
    harness.drain(1)
    assert harness.scheduler.cache_usage == 0.0
    harness.add(new_request("b", [*range(4), *range(20, 29)], max_tokens=1))
    harness.step()
    record = harness.scheduler.last_record
    assert (record.num_prefix_queries, record.num_prefix_hits) == (12, 4)
    assert (record.num_blocks, record.num_free_blocks, record.num_cached_blocks) == (16, 12, 1)
    assert harness.scheduler.cache_usage == 0.0, "b ended with its first token"
    harness.add(new_request("c", range(40, 52), max_tokens=2))
    harness.step()
    assert harness.scheduler.cache_usage == 3 / 16


def test_hits_on_free_blocks_take_room_too() -> None:
    """Of three free blocks two are hits; with the third, for the rest of c, none were left for b to grow."""
    harness = Harness(num_blocks=4, block_size=4)
    harness.add(new_request("a", range(8), max_tokens=1))
    harness.drain(1)
    harness.add(new_request("b", [30], max_tokens=6))
    harness.step()
    harness.add(new_request("c", range(9), max_tokens=1))
    assert harness.schedule().new == ()
    assert harness.scheduler.last_record.stalled == (Stalled("c", "no_blocks"),)


def test_the_final_of_an_aborted_request_says_what_was_cached() -> None:
    harness = Harness()
    for name in "ab":
        harness.add(new_request(name, range(9), max_tokens=5))
        harness.step()
    assert harness.abort("b") == [TokenDelta("b", (), num_cached_tokens=8, finish_reason="abort")]
