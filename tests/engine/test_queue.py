"""The bound of the queue: what is let in, what is refused with which words, and when to come back."""

import random

import pytest

from quire.engine import queue as queue_bound
from quire.engine.queue import ANYBODY, Caller, QueueBound, QueueConfig, Rate
from quire.errors import InvalidRequestError, OverloadedError, TooManyRequestsError


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def bound(
    max_requests: int = 4, max_tokens: int = 1000, rows: int = 0, weights: dict[str, int] | None = None
) -> tuple[QueueBound, Clock]:
    clock = Clock()
    queue = QueueBound(QueueConfig(max_requests, max_tokens, 2), clock)
    queue.expect(weights or {})
    queue.observe(2 - rows, 0)
    return queue, clock


def fill(queue: QueueBound, name: str, tokens: int = 1) -> int:
    """Let in one at a time until it is full; how many."""
    count = 0
    try:
        while True:
            queue.enter(Caller(name), tokens, (f"{name}{count}",))
            count += 1
    except OverloadedError:
        return count


def test_requests_are_bounded_and_free_rows_come_on_top() -> None:
    queue, _ = bound(max_requests=4)
    assert fill(queue, "") == 4
    assert queue.num_waiting == 4
    queue, _ = bound(max_requests=4, rows=2)
    assert fill(queue, "") == 6
    queue, _ = bound(max_requests=0, rows=1)
    assert fill(queue, "") == 1, "with no queue, a request that finds a row is still served"


def test_rows_are_not_free_while_somebody_waits_for_blocks() -> None:
    queue, _ = bound(max_requests=4)
    queue.observe(0, 3)
    assert fill(queue, "") == 4


def test_tokens_are_bounded() -> None:
    queue, _ = bound(max_requests=100, max_tokens=10)
    assert fill(queue, "", tokens=3) == 3
    assert queue._total.tokens == 9
    with pytest.raises(OverloadedError, match="9 prompt tokens wait"):
        queue.enter(ANYBODY, 2, ("x",))
    queue.enter(ANYBODY, 1, ("y",))
    assert queue.num_rejected == {"requests": 0, "tokens": 2}


def test_what_can_never_wait_is_refused_with_the_numbers() -> None:
    queue, _ = bound(max_requests=4, max_tokens=10)
    with pytest.raises(InvalidRequestError, match=r"7 sequences at once; 2 run and 4 wait") as caught:
        queue.enter(ANYBODY, 1, tuple("abcdefg"))
    assert caught.value.param == "n"
    with pytest.raises(InvalidRequestError, match=r"2 x 6 prompt tokens can never wait: the queue holds 10"):
        queue.enter(ANYBODY, 6, ("a", "b"))
    assert queue.num_waiting == 0


def test_who_leaves_makes_room() -> None:
    queue, _ = bound(max_requests=2)
    assert fill(queue, "") == 2
    queue.left("0", was_scheduled=True)
    queue.left("0", was_scheduled=True)
    queue.left("never seen", was_scheduled=False)
    assert fill(queue, "") == 1
    with pytest.raises(OverloadedError):
        queue.check_room(ANYBODY)


def test_retry_after_is_the_time_that_the_queue_needs() -> None:
    queue, clock = bound(max_requests=100)
    for number in range(100):
        queue.enter(ANYBODY, 1, (f"a{number}",))
    with pytest.raises(OverloadedError) as caught:
        queue.enter(ANYBODY, 1, ("x",))
    assert caught.value.retry_after_s == queue_bound.FIRST_RETRY_SECONDS, "nothing has left yet"
    for number in range(100):  # two a second, and each is replaced
        clock.now_s += 0.5
        queue.left(f"a{number}", was_scheduled=True)
        queue.enter(ANYBODY, 1, (f"b{number}",))
    with pytest.raises(OverloadedError) as caught:
        queue.enter(ANYBODY, 1, ("x",))
    assert 45 <= caught.value.retry_after_s <= 56
    clock.now_s += 1000
    with pytest.raises(OverloadedError) as caught:
        queue.enter(ANYBODY, 1, ("x",))
    assert caught.value.retry_after_s == queue_bound.MAX_RETRY_SECONDS, "it stands still"


def test_who_gives_up_does_not_count_as_progress() -> None:
    queue, clock = bound(max_requests=4)
    fill(queue, "")
    for number in range(3):
        queue.left(str(number), was_scheduled=False)
        clock.now_s += 0.1
    fill(queue, "a")
    with pytest.raises(OverloadedError) as caught:
        queue.check_room(ANYBODY)
    assert caught.value.retry_after_s == queue_bound.FIRST_RETRY_SECONDS


def test_one_callers_flood_leaves_the_shares_of_others() -> None:
    queue, _ = bound(max_requests=100, weights={"a": 3, "b": 1, "c": 1})
    assert fill(queue, "a") == 30 + 50, "its share of one half, and the other half"
    with pytest.raises(TooManyRequestsError, match="80 of the 80 requests that wait are its own"):
        queue.check_room(Caller("a"))
    assert fill(queue, "b") == 10
    assert fill(queue, "c") == 10
    assert queue.num_waiting == 100


def test_random_comings_and_goings_stay_within_bound_and_shares() -> None:
    dice = random.Random(5)
    weights = {"a": 1, "b": 2, "c": 5}
    queue, _ = bound(max_requests=40, max_tokens=400, weights=weights)
    inside: dict[str, str] = {}
    for number in range(3000):
        if inside and dice.random() < 0.45:
            gone = dice.choice(sorted(inside))
            queue.left(gone, was_scheduled=dice.random() < 0.5)
            del inside[gone]
            continue
        name = dice.choice("aab c".replace(" ", ""))
        held = sum(other == name for other in inside.values())
        try:
            queue.enter(Caller(name), 1, (str(number),))
            inside[str(number)] = name
        except TooManyRequestsError:
            assert held >= int(40 * weights[name] / 8 / 2), "no caller is refused its share"
        assert queue.num_waiting == len(inside) <= 40
    for name in list(inside):
        queue.left(name, was_scheduled=True)
    assert queue.num_waiting == queue._total.tokens == 0
    assert queue._held == {} and queue._waiting == {}


class Steady:
    """A rate that is known."""

    def __init__(self, per_second: float | None) -> None:
        self.per_second = per_second

    def read(self, now_s: float) -> float | None:
        return self.per_second


@pytest.mark.parametrize(("waiting", "per_second", "expected"), [
    (7, 2.0, 4), (8, 2.0, 4), (9, 2.0, 5), (1, 3.0, 1), (1, 1000.0, 1), (10, 0.3, 34), (599, 1.0, 599),
    (600, 1.0, queue_bound.MAX_RETRY_SECONDS), (7, 0.0, queue_bound.MAX_RETRY_SECONDS),
    (7, None, queue_bound.FIRST_RETRY_SECONDS),
])  # fmt: skip
@pytest.mark.parametrize("what", ["requests", "tokens"])
def test_the_time_to_come_back_is_whole_seconds_and_never_too_short(
    what: str, waiting: int, per_second: float | None, expected: int
) -> None:
    """RFC 9110, 10.2.3: a number of seconds without a part; what is asked for before it is over is refused again."""
    full = {"requests": (waiting, 10**9), "tokens": (10**9, waiting)}[what]
    queue, _ = bound(max_requests=full[0], max_tokens=full[1])
    queue._requests_rate = queue._tokens_rate = Steady(None if per_second is None else 10**6)  # type: ignore[assignment]
    setattr(queue, f"_{what}_rate", Steady(per_second))
    for number in range(waiting):
        queue.enter(ANYBODY, 1, (str(number),))
    with pytest.raises(OverloadedError, match=str(waiting)) as caught:
        queue.enter(ANYBODY, 1, ("x",))
    assert caught.value.retry_after_s == expected
    assert per_second is None or expected == queue_bound.MAX_RETRY_SECONDS or expected * per_second >= waiting


def test_a_prompt_of_any_length_that_fits_is_let_in_where_nobody_waits() -> None:
    queue, _ = bound(max_requests=100, max_tokens=10, weights={"a": 1, "b": 1})
    queue.enter(Caller("a"), 10, ("long",))
    with pytest.raises(TooManyRequestsError):
        queue.enter(Caller("a"), 1, ("more",))
    queue.left("long", was_scheduled=False)
    queue.enter(Caller("a"), 10, ("again",))


def test_one_known_caller_has_no_share_to_keep_from_others() -> None:
    queue, _ = bound(max_requests=10, weights={"a": 1})
    assert fill(queue, "") == 10
    with pytest.raises(OverloadedError, match="the queue is full: 10 requests wait") as caught:
        queue.check_room(Caller("a"))
    assert not isinstance(caught.value, TooManyRequestsError)


def test_five_thousand_callers_leave_nothing_behind() -> None:
    """Counts are right with as many callers as there are, and each is forgotten when its last request has left."""
    queue, _ = bound(max_requests=20_000, max_tokens=10**6, weights={str(n): 1 for n in range(5000)})
    for number in range(5000):
        queue.enter(Caller(str(number)), 3, (f"{number}.0", f"{number}.1"))
    assert (queue.num_waiting, queue._total.tokens, len(queue._held)) == (10_000, 30_000, 5000)
    for number in range(5000):
        queue.left(f"{number}.0", was_scheduled=True)
    assert (queue.num_waiting, queue._total.tokens, len(queue._held)) == (5000, 15_000, 5000)
    for number in range(5000):
        queue.left(f"{number}.1", was_scheduled=False)
    assert (queue.num_waiting, queue._total.tokens, queue._held, queue._waiting) == (0, 0, {}, {})


@pytest.mark.parametrize("age_s", [1, 3, 10, 40])
def test_a_steady_rate_is_known_from_its_beginning(age_s: int) -> None:
    """Twenty a second give twenty a second, however short the memory of them is."""
    rate = Rate()
    for number in range(20 * age_s + 1):
        rate.add(1, 100.0 + number / 20)
    found = rate.read(100.0 + age_s)
    assert found is not None and found == pytest.approx(20, rel=0.1)
    quiet = rate.read(100.0 + age_s + queue_bound.RATE_SECONDS)
    assert quiet is not None and quiet < found / 2


def test_a_rate_follows_what_happens() -> None:
    rate, now_s = Rate(), 50.0
    assert rate.read(now_s) is None
    for _ in range(400):
        now_s += 0.25
        rate.add(3, now_s)
    found = rate.read(now_s)
    assert found == pytest.approx(12, rel=0.05)
    later = rate.read(now_s + 30)
    assert later is not None and later < 1
