"""The circuit breaker: how many deaths open it, for how long, and what closes it. Times are chosen; no clock runs."""

import pytest

from quire.isolation.breaker import (
    FIRST_PAUSE_SECONDS,
    LONG_LIFE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_DEATHS_IN_A_ROW,
    Breaker,
)

FIRST_PAUSES = [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
"""Each twice as long as the one before, up to the longest."""


def die(breaker: Breaker, count: int, now_s: float = 0.0) -> None:
    """So many cores in a row, each at once."""
    for _ in range(count):
        breaker.record_failure(now_s, now_s)


def pauses_of(breaker: Breaker, count: int, now_s: float) -> list[float]:
    """Of an open breaker: each core that is started when a pause is over dies at once."""
    found = []
    for _ in range(count):
        assert breaker.open_until_s is not None
        found.append(breaker.open_until_s - now_s)
        now_s = breaker.open_until_s
        assert breaker.may_start(now_s)
        breaker.record_failure(now_s, now_s)
    return found


def test_the_third_death_in_a_row_opens_it_for_exactly_the_first_pause() -> None:
    assert (MOST_DEATHS_IN_A_ROW, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS) == (3, 5.0, 60.0)
    breaker = Breaker()
    for number in range(2):
        breaker.record_failure(0.0, float(number))
        assert breaker.may_start(float(number)) and breaker.open_until_s is None
    breaker.record_failure(0.0, 7.5)
    assert breaker.open_until_s == 12.5
    assert not breaker.may_start(7.5) and not breaker.may_start(12.4999)
    assert breaker.open_until_s == 12.5, "asking changes nothing before the time"
    assert breaker.may_start(12.5) and breaker.open_until_s is None, "at its end a pause is over"


def test_each_core_that_then_dies_in_vain_doubles_the_pause_up_to_the_longest() -> None:
    breaker = Breaker()
    die(breaker, 3)
    assert pauses_of(breaker, 7, 0.0) == FIRST_PAUSES


def test_a_core_that_was_of_use_begins_the_count_and_the_pauses_anew() -> None:
    breaker = Breaker()
    die(breaker, 3)
    pauses_of(breaker, 3, 0.0)
    breaker.record_success()
    now_s = 1000.0
    assert breaker.may_start(now_s)
    die(breaker, 2, now_s)
    assert breaker.may_start(now_s)
    die(breaker, 1, now_s)
    assert pauses_of(breaker, 7, now_s) == FIRST_PAUSES


def test_use_between_deaths_keeps_it_closed() -> None:
    breaker = Breaker()
    for number in range(10):
        die(breaker, 2, float(number))
        breaker.record_success()
    assert breaker.may_start(10.0)


@pytest.mark.parametrize(("life_s", "is_open"), [(LONG_LIFE_SECONDS, False), (LONG_LIFE_SECONDS - 0.001, True)])
def test_a_long_life_counts_as_use(life_s: float, is_open: bool) -> None:
    """The death that ends it is the first of a new row."""
    breaker = Breaker()
    die(breaker, 2)
    breaker.record_failure(100.0, 100.0 + life_s)
    assert breaker.may_start(100.0 + life_s) is not is_open
    if not is_open:
        breaker.record_failure(0.0, 1.0)
        assert breaker.may_start(1.0)
        breaker.record_failure(1.0, 2.0)
        assert breaker.open_until_s == 2.0 + FIRST_PAUSE_SECONDS


def test_a_death_that_is_explained_takes_one_back_and_never_more_than_there_were() -> None:
    breaker = Breaker()
    breaker.record_attributed(0.0, 0.0)
    die(breaker, 2)
    breaker.record_attributed(0.0, 0.0)
    die(breaker, 1)
    assert breaker.may_start(0.0), "two of three are left"
    die(breaker, 1)
    assert not breaker.may_start(0.0)


def test_explanations_without_a_token_in_between_count_from_the_third_on() -> None:
    for num_before, num_explained, is_open in (
        (1, 2, False),
        (2, 3, False),
        (2, 4, False),
        (2, 5, True),
        (0, 4, False),
    ):
        breaker = Breaker()
        die(breaker, num_before)
        for _ in range(num_explained):
            breaker.record_attributed(0.0, 0.0)
        assert breaker.may_start(0.0) is not is_open, (num_before, num_explained)


def test_deaths_from_outside_open_it_and_let_wait_until_the_pause_is_the_longest() -> None:
    breaker, now_s, pauses = Breaker(), 0.0, []
    while breaker.lets_wait:
        breaker.record_failure(now_s, now_s, by_itself=False)
        if breaker.open_until_s is not None:
            pauses.append(breaker.open_until_s - now_s)
            now_s = breaker.open_until_s
            assert breaker.may_start(now_s)
    assert pauses == FIRST_PAUSES[:5]
    breaker.record_success()
    assert breaker.lets_wait


def test_one_death_from_outside_among_those_by_itself_is_not_counted_against_the_engine() -> None:
    breaker = Breaker()
    for by_itself in (True, False, True):
        breaker.record_failure(0.0, 0.0, by_itself=by_itself)
    assert not breaker.may_start(0.0) and breaker.lets_wait
    breaker.record_failure(0.0, 0.0)
    assert not breaker.lets_wait


def test_a_death_that_is_explained_takes_one_by_itself_back_too() -> None:
    breaker = Breaker()
    die(breaker, 2)
    breaker.record_attributed(0.0, 0.0)
    for by_itself in (True, False):
        breaker.record_failure(0.0, 0.0, by_itself=by_itself)
    assert not breaker.may_start(0.0) and breaker.lets_wait


def test_a_token_excuses_the_requests() -> None:
    breaker = Breaker()
    for _ in range(20):
        for _ in range(2):
            breaker.record_attributed(0.0, 0.0)
        breaker.record_success()
    assert breaker.may_start(0.0)


def test_use_forgets_explanations_too() -> None:
    breaker = Breaker()
    breaker.record_attributed(0.0, 0.0)
    breaker.record_attributed(0.0, 0.0)
    breaker.record_success()
    for _ in range(2):
        breaker.record_attributed(0.0, 0.0)
        die(breaker, 1)
    assert breaker.may_start(0.0)


def test_deaths_attributed_to_one_request_after_another_are_not_of_the_requests() -> None:
    for does_work in (True, False):
        breaker, num_attributed = Breaker(), 0
        while breaker.may_start(0.0) and num_attributed < 20:
            breaker.record_failure(0.0, 0.0)
            breaker.record_attributed(0.0, 0.0)
            num_attributed += 1
            if does_work:
                breaker.record_success()
        assert num_attributed == (20 if does_work else 4)
