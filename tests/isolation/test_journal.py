"""Which requests are resumed after a death, with what, and to which request the death is attributed."""

from collections.abc import Callable

import pytest

from quire.core.plan import TokenDelta, TokenLogprobs
from quire.core.request import ResumeState
from quire.isolation.journal import LONGER_PROBE, MOST_PROBES, PROBE_TOKENS, DeathReport, Journal
from tests.core.harness import new_request


def journal_of(names: str, max_tokens: int = 9) -> Journal:
    """Requests that all run and have each given one token."""
    journal = Journal()
    for name in names:
        journal.add(new_request(name, [1, 2, 3], max_tokens=max_tokens))
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
    assert [new.resume for new in journal.take_unsent()] == [ResumeState()]
    one = TokenLogprobs((1,), (-1.0,), (1,))
    journal.enter(["a"])
    journal.take([TokenDelta("a", (), prompt_logprobs=(one, one))])
    journal.take([TokenDelta("a", (5,), num_cached_tokens=2), TokenDelta("gone", (1,))])
    journal.take([TokenDelta("a", (6,), num_cached_tokens=3)])
    assert journal.num_sent == 1
    kill(journal)
    assert journal.num_sent == 0
    assert [new.resume for new in journal.take_unsent()] == [ResumeState((5, 6), 2, 2)]


def test_the_ended_and_the_aborted_are_forgotten() -> None:
    journal = journal_of("abc")
    assert journal.take([TokenDelta("a", (1,), finish_reason="stop")])
    assert journal.remove("b") and not journal.remove("b") and not journal.remove("a")
    assert (len(journal), journal.num_sent) == (1, 1)
    kill(journal)
    assert not journal.remove("c")
    assert len(journal) == 0 and sent(journal) == ""


def crash(journal: Journal) -> DeathReport:
    return journal.core_died(by_itself=True)


def kill(journal: Journal) -> DeathReport:
    return journal.core_died(by_itself=False)


def try_all(journal: Journal, names: str, num_tokens: int = PROBE_TOKENS) -> None:
    """Each is alone in the core until it is cleared."""
    for name in names:
        (new,) = journal.take_unsent()
        assert (new.request_id, new.max_tokens) == (name, len(new.resume.output_token_ids) + num_tokens)
        assert sent(journal) == "" and journal.num_sent == 1
        journal.enter(name)
        for _ in range(num_tokens - 1):
            journal.take([TokenDelta(name, (5,))])
            assert sent(journal) == ""
        (delta,) = journal.take([TokenDelta(name, (5,), finish_reason="length")])
        assert delta.finish_reason is None and delta.token_ids == (5,)


def test_after_a_kill_all_go_on_at_once() -> None:
    journal = journal_of("abc")
    assert kill(journal).num_kept == 3
    journal.add(new_request("n", [1]))
    assert sent(journal) == "abcn" and sent(journal) == ""


def test_after_a_crash_each_is_tried_alone_and_then_all_go_on() -> None:
    journal = journal_of("abc")
    assert crash(journal).num_kept == 3
    journal.add(new_request("n", [1]))
    try_all(journal, "abc")
    ready = journal.take_unsent()
    assert [new.request_id for new in ready] == list("abcn") and journal.num_sent == 4
    assert [len(new.resume.output_token_ids) for new in ready] == [3, 3, 3, 0]
    assert [new.max_tokens for new in ready[:3]] == [9] * 3


@pytest.mark.parametrize("die", [crash, kill])
def test_alone_in_two_deaths_fails(die: Callable[[Journal], DeathReport]) -> None:
    journal = journal_of("a")
    assert die(journal).failed == ()
    assert sent(journal) == "a"
    run(journal, "a")
    report = die(journal)
    assert (report.failed, report.num_kept, report.is_attributed) == (("a",), 0, True)


@pytest.mark.parametrize("bad", "abcd")
def test_who_crashes_a_core_fails_with_the_second_death_and_alone(bad: str) -> None:
    journal = journal_of("abcd")
    crash(journal)
    try_all(journal, "abcd"[: "abcd".index(bad)])
    assert sent(journal) == bad
    journal.enter(bad)
    report = crash(journal)
    assert (report.failed, report.num_kept, report.is_attributed, report.is_narrowed) == ((bad,), 3, True, False)
    assert sent(journal) == "abcd".replace(bad, "")


def test_who_entered_with_the_crash_is_tried_first() -> None:
    journal = journal_of("abc")
    journal.add(new_request("x", [1]))
    assert sent(journal) == "x"
    journal.enter("x")
    crash(journal)
    assert sent(journal) == "x"
    journal.enter("x")
    assert crash(journal).failed == ("x",)


def test_two_kills_try_who_was_present_in_both() -> None:
    journal = journal_of("ab", max_tokens=60)
    kill(journal)
    journal.add(new_request("n", [1], max_tokens=60))
    assert sent(journal) == "abn"
    run(journal, "abn")
    report = kill(journal)
    assert (report.failed, report.is_attributed, report.is_narrowed) == ((), False, False)
    try_all(journal, "ab")
    assert sent(journal) == "abn"
    run(journal, "abn")
    report = kill(journal)
    assert (report.failed, report.num_kept, report.is_attributed) == ((), 3, False), "no kill fails those that it finds"
    try_all(journal, "ab", PROBE_TOKENS * LONGER_PROBE)
    try_all(journal, "n")
    assert sent(journal) == "abn"
    run(journal, "abn")
    report = crash(journal)
    assert (report.failed, report.num_kept, report.is_attributed) == (("a", "b", "n"), 0, False)


def test_a_cleared_request_is_probed_for_longer() -> None:
    journal = journal_of("ab", max_tokens=40)
    crash(journal)
    try_all(journal, "ab")
    assert sent(journal) == "ab"
    journal.enter("ab")
    crash(journal)
    try_all(journal, "ab", PROBE_TOKENS * LONGER_PROBE)
    assert sent(journal) == "ab"


def test_a_probe_may_be_the_end_of_a_request() -> None:
    journal = journal_of("ab", max_tokens=2)
    crash(journal)
    (a,) = journal.take_unsent()
    journal.enter("a")
    assert (a.request_id, a.max_tokens) == ("a", 2)
    (delta,) = journal.take([TokenDelta("a", (5,), finish_reason="length")])
    assert delta.finish_reason == "length" and len(journal) == 1
    assert sent(journal) == "b"
    journal.enter("b")
    assert journal.take([TokenDelta("b", (5,), finish_reason="stop")])[0].finish_reason == "stop"
    assert len(journal) == journal.num_sent == 0


def test_no_death_is_attributed_to_a_request_in_the_queue() -> None:
    journal = journal_of("a")
    journal.add(new_request("b", [1]))
    assert sent(journal) == "b"
    crash(journal)
    assert sent(journal) == "a"
    journal.enter("a")
    assert crash(journal).failed == ("a",)
    for _ in range(5):
        assert sent(journal) == "b"
        assert crash(journal).num_kept == 1


def test_a_death_while_nobody_was_present_keeps_the_probes() -> None:
    journal = journal_of("abc")
    crash(journal)
    try_all(journal, "a")
    assert sent(journal) == "b"
    assert crash(journal).failed == ()
    try_all(journal, "bc")
    assert sent(journal) == "abc"


def test_what_is_attributed_to_one_is_not_held_against_others() -> None:
    journal = journal_of("ab")
    for bad in "xyz":
        journal.add(new_request(bad, [1]))
        sent(journal)
        journal.enter(bad)
        assert crash(journal).failed == ()
        assert sent(journal) == bad
        journal.enter(bad)
        assert crash(journal).failed == (bad,)
        assert sent(journal) == "ab"
        run(journal, "ab")
    assert crash(journal).failed == () and len(journal) == 2


def test_a_quarantined_request_that_leaves_lets_the_next_enter() -> None:
    journal = journal_of("abc")
    crash(journal)
    assert sent(journal) == "a"
    assert journal.remove("a") and sent(journal) == "b"
    assert not journal.remove("c") and journal.remove("b")
    journal.add(new_request("n", [1]))
    assert sent(journal) == "n" and journal.num_sent == 1


@pytest.mark.parametrize("count", [2, MOST_PROBES, 3 * MOST_PROBES + 1, 1000])
def test_many_are_probed_in_groups_and_the_bad_one_is_found(count: int) -> None:
    names, bad = [str(number) for number in range(count)], str(count * 2 // 3)
    journal = Journal()
    for name in names:
        journal.add(new_request(name, [1], max_tokens=9))
    num_deaths, num_unexplained, failed = 0, 0, ()
    while not failed:
        num_sent = 0
        while group := journal.take_unsent():
            num_sent += 1
            assert num_sent <= MOST_PROBES
            journal.enter(new.request_id for new in group)
            if bad in {new.request_id for new in group}:
                report = crash(journal)
                failed, num_deaths = report.failed, num_deaths + 1
                num_unexplained += not (report.is_attributed or report.is_narrowed)
                break
            journal.take(TokenDelta(new.request_id, (5, 5), finish_reason="length") for new in group)
    assert failed == (bad,) and len(journal) == count - 1
    assert (num_deaths, num_unexplained) == (2 if count <= MOST_PROBES else 3, 1)
