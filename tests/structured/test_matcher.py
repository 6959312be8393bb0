"""One answer through its grammar: the plan that closes it, and what becomes of it."""

import pytest

from quire.errors import ShapeError
from quire.structured.closing import Closer, TextTokens
from quire.structured.matcher import NEAR, Matcher
from tests.structured import grammars

EOS = 261
CLOSER = Closer(TextTokens(lambda text: text[0] if len(text) == 1 else None, 262))


def begun(max_tokens: int, regex: str) -> Matcher:
    inner = grammars.matcher(regex=regex)
    return Matcher(inner, CLOSER, (EOS,), CLOSER.shortest(inner, 1000), max_tokens)


def follow(matcher: Matcher, text: str) -> None:
    for byte in text.encode():
        assert matcher.decide(byte) == byte
        matcher.consume(byte)


def test_the_last_tokens_are_the_plan() -> None:
    matcher = begun(6, "[a-z]*!")
    follow(matcher, "abcd")
    assert list(matcher.forced) == [ord("!"), EOS]
    for token_id in (ord("!"), EOS):
        assert matcher.decide(token_id) == token_id
        matcher.consume(token_id)
    assert not matcher.forced


def test_a_token_that_leads_too_far_is_replaced() -> None:
    """After x come nine more; what was planned comes in its place."""
    matcher = begun(8, "(a|xbcdefghi)!")
    assert matcher.decide(ord("x")) == ord("a")
    assert begun(11, "(a|xbcdefghi)!").decide(ord("x")) == ord("x")


def test_the_end_has_a_token_of_its_own() -> None:
    """With three tokens left after x, yz! would fit and its end would not; what alone fits is followed."""
    assert begun(4, "(a|xyz)!").decide(ord("x")) == ord("a")
    assert begun(5, "(a|xyz)!").decide(ord("x")) == ord("x")
    matcher = begun(3, "[a-z]*!")
    assert not matcher.forced
    follow(matcher, "q")
    assert list(matcher.forced) == [ord("!"), EOS]


def test_far_from_the_end_no_plan_is_kept_and_near_it_one_is_found() -> None:
    """From `NEAR` tokens and four times the shortest answer on, by the number of tokens alone."""
    matcher = begun(NEAR + 4 + 3, "[a-z]*!")
    for _ in range(2):
        follow(matcher, "a")
        assert matcher._plan is None
    follow(matcher, "a")
    assert matcher._plan is not None and matcher._plan[-1] == ord("!")


def test_a_plan_that_was_not_found_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = begun(NEAR + 4 + 1, "[a-z]*!")
    monkeypatch.setattr(Closer, "completion", lambda *_, **__: None)
    follow(matcher, "ab")
    assert matcher._plan is None
    monkeypatch.undo()
    follow(matcher, "c" * 16)
    assert matcher._plan is not None


def test_an_end_before_the_answer_is_whole_is_an_error() -> None:
    """llguidance allows the end alone where it gave up."""
    with pytest.raises(ShapeError, match="it is not complete"):
        begun(9, "[a-z]*!").consume(EOS)


def test_what_the_grammar_excludes_is_an_error() -> None:
    with pytest.raises(ShapeError, match="structured_outputs cannot be followed here"):
        begun(9, "[a-z]*!").consume(ord("1"))


def test_every_end_of_sequence_ends() -> None:
    """A model may have several; the one that was sampled is taken."""
    inner = grammars.matcher(regex="[a-z]*")
    matcher = Matcher(inner, CLOSER, (EOS - 1, EOS), CLOSER.shortest(inner, 10), 9)
    follow(matcher, "ab")
    assert matcher.decide(EOS) == EOS and matcher.decide(EOS - 1) == EOS - 1
    matcher.consume(EOS)
    assert not matcher.forced
