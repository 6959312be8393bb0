"""Who goes on after a death, with what, and who is to blame for it."""

import pytest

from quire.core.plan import TokenDelta, TokenLogprobs
from quire.core.request import Given
from quire.engine.breaker import FIRST_PAUSE_SECONDS, LONG_LIFE_SECONDS, LONGEST_PAUSE_SECONDS, Breaker
from quire.engine.journal import MOST_ENTRANCES, Journal
from tests.core.harness import new_request


def journal_of(names: str) -> Journal:
    """Requests that all run and have each given one token."""
    journal = Journal()
    for name in names:
        journal.add(new_request(name, [1, 2, 3], max_tokens=9))
    assert [new.request_id for new in journal.take_unsent()] == list(names)
    run(journal, names)
    return journal


def run(journal: Journal, names: str) -> None:
    journal.enter(names)
    journal.take(TokenDelta(name, (5,)) for name in names)


def sent(journal: Journal) -> str:
    return "".join(new.request_id for new in journal.take_unsent())


def test_what_was_given_goes_along() -> None:
    journal = Journal()
    journal.add(new_request("a", [1, 2, 3], max_tokens=9))
    assert [new.given for new in journal.take_unsent()] == [Given()]
    one = TokenLogprobs((1,), (-1.0,), (1,))
    journal.enter(["a"])
    journal.take([TokenDelta("a", (), prompt_logprobs=(one, one))])
    journal.take([TokenDelta("a", (5,), num_cached_tokens=2), TokenDelta("gone", (1,))])
    journal.take([TokenDelta("a", (6,), num_cached_tokens=3)])
    assert journal.num_sent == 1
    journal.core_died()
    assert journal.num_sent == 0
    assert [new.given for new in journal.take_unsent()] == [Given((5, 6), 2, 2)]


def test_the_ended_and_the_aborted_are_forgotten() -> None:
    journal = journal_of("abc")
    assert journal.take([TokenDelta("a", (1,), finish_reason="stop")])
    assert journal.remove("b") and not journal.remove("b") and not journal.remove("a")
    assert (len(journal), journal.num_sent) == (1, 1)
    journal.core_died()
    assert not journal.remove("c")
    assert len(journal) == 0 and sent(journal) == ""


def test_after_one_death_all_go_on_at_once() -> None:
    journal = journal_of("abc")
    assert journal.core_died().num_kept == 3
    journal.add(new_request("n", [1]))
    assert sent(journal) == "abc" and sent(journal) == ""
    run(journal, "ab")
    assert sent(journal) == ""
    run(journal, "c")
    assert sent(journal) == "n"  # newcomers when those are cleared


def test_alone_in_two_deaths_fails() -> None:
    journal = journal_of("a")
    assert journal.core_died().failed == ()
    assert sent(journal) == "a"
    run(journal, "a")
    verdict = journal.core_died()
    assert (verdict.failed, verdict.num_kept, verdict.is_found) == (("a",), 0, True)


def test_present_in_two_deaths_are_suspects_and_fail_with_the_third() -> None:
    journal = journal_of("ab")
    journal.core_died()
    assert sent(journal) == "ab"
    run(journal, "ab")
    verdict = journal.core_died()
    assert (verdict.failed, verdict.is_found, verdict.is_narrowed) == ((), False, False)
    for name in "ab":
        assert sent(journal) == name and sent(journal) == ""
        run(journal, name)
    verdict = journal.core_died()
    assert (verdict.failed, verdict.num_kept, verdict.is_found) == (("a", "b"), 0, False)


def test_who_waits_in_the_queue_is_never_to_blame() -> None:
    journal = journal_of("a")
    journal.add(new_request("b", [1]))
    assert sent(journal) == "b"
    journal.core_died()
    assert sent(journal) == "a"
    journal.enter("a")
    assert journal.core_died().failed == ("a",)
    for _ in range(5):
        assert sent(journal) == "b"
        assert journal.core_died().num_kept == 1


def test_one_bad_newcomer_fails_alone() -> None:
    journal = journal_of("abcdef")
    journal.add(new_request("x", [1]))
    assert sent(journal) == "x"
    journal.enter("x")
    assert journal.core_died().failed == ()  # only x was entering
    journal.add(new_request("n", [1]))
    assert sent(journal) == "abcdef" and sent(journal) == ""
    run(journal, "abcdef")
    assert sent(journal) == "x"
    journal.enter("x")
    verdict = journal.core_died()
    assert (verdict.failed, verdict.num_kept, verdict.is_found) == (("x",), 7, True)
    assert sent(journal) == "abcdef"
    run(journal, "abcdef")
    assert sent(journal) == "n"


def test_one_that_turns_bad_while_it_runs_fails_alone() -> None:
    """It kills again with the step with which it enters again; one who came meanwhile is not blamed for it."""
    journal = journal_of("abx")
    journal.add(new_request("n", [1]))
    assert sent(journal) == "n"
    journal.enter("n")
    journal.core_died()
    assert sent(journal) == "abx"
    journal.enter("abx")
    journal.core_died()
    assert sent(journal) == "n"  # it entered with the first death alone
    run(journal, "n")
    for name in "ab":
        assert sent(journal) == name and sent(journal) == ""
        run(journal, name)
    assert sent(journal) == "x"
    journal.enter("x")
    verdict = journal.core_died()
    assert (verdict.failed, verdict.is_found, len(journal)) == (("x",), True, 3)


def test_what_one_is_to_blame_for_is_not_held_against_others() -> None:
    journal = journal_of("ab")
    for bad in "xyz":
        journal.add(new_request(bad, [1]))
        sent(journal)
        journal.enter(bad)
        assert journal.core_died().failed == ()
        assert sent(journal) == "ab"
        run(journal, "ab")
        assert sent(journal) == bad
        journal.enter(bad)
        assert journal.core_died().failed == (bad,)
        assert sent(journal) == "ab"
        run(journal, "ab")
    assert journal.core_died().failed == () and len(journal) == 2


def test_a_suspect_that_leaves_lets_the_next_enter() -> None:
    journal = journal_of("ab")
    for _ in range(2):
        journal.core_died()
        journal.enter(sent(journal))
    journal.add(new_request("n", [1]))
    journal.remove("a")
    journal.core_died()
    journal.add(new_request("m", [1]))
    assert sent(journal) == "b"
    journal.remove("b")
    assert sent(journal) == "nm"


@pytest.mark.parametrize("count", [2, MOST_ENTRANCES, 3 * MOST_ENTRANCES + 1, 1000])
def test_many_suspects_enter_in_groups_and_the_bad_one_is_found(count: int) -> None:
    names, bad = [str(number) for number in range(count)], str(count * 2 // 3)
    journal = Journal()
    for name in names:
        journal.add(new_request(name, [1]))
    num_unexplained, failed, entrances = 0, (), 0
    while not failed:
        entrances = 0
        while group := [new.request_id for new in journal.take_unsent()]:
            entrances += 1
            journal.enter(group)
            if bad in group:
                verdict = journal.core_died()
                failed = verdict.failed
                num_unexplained += not (verdict.is_found or verdict.is_narrowed)
                break
            journal.take(TokenDelta(name, (5,)) for name in group)
        assert entrances <= MOST_ENTRANCES + 2
    assert failed == (bad,) and num_unexplained == 2 and len(journal) == count - 1


def test_the_breaker_opens_when_cores_die_in_vain() -> None:
    breaker = Breaker()
    breaker.died(0.0, 1.0)
    breaker.explained()
    breaker.explained()
    breaker.died(1.0, 2.0)
    breaker.died(2.0, 3.0)
    assert breaker.may_start(3.0)
    breaker.died(3.0, 4.0)
    assert not breaker.may_start(4.0 + FIRST_PAUSE_SECONDS / 2)
    now_s, pauses_s = 4.0 + FIRST_PAUSE_SECONDS, []
    for _ in range(6):
        assert breaker.may_start(now_s)
        breaker.died(now_s, now_s)
        assert breaker.open_until_s is not None
        pauses_s.append(breaker.open_until_s - now_s)
        now_s = breaker.open_until_s
    assert pauses_s[:2] == [2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses_s[-1] == LONGEST_PAUSE_SECONDS


def test_use_or_a_long_life_closes_the_breaker() -> None:
    breaker = Breaker()
    for born_s in range(10):
        breaker.died(born_s, born_s + 1.0)
        breaker.proved()
    for number in range(10):
        then_s = number * LONG_LIFE_SECONDS
        breaker.died(then_s, then_s + LONG_LIFE_SECONDS)
    assert breaker.may_start(0.0)
