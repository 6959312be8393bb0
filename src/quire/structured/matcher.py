"""Follows one answer through its grammar, and knows how it can end when the end comes near."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.errors import ShapeError
from quire.structured.closing import Closer
from quire.structured.reasoning import ReasoningBound
from quire.structured.unique import UniqueKeys

if TYPE_CHECKING:
    from llguidance import LLMatcher

NEAR = 256
"""Tokens left, beyond four times the shortest answer, from which on a completion is known."""
_OFTEN = 16
"""Tokens from one look for a completion to the next, where none was found."""

_PART = 128
"""Tokens that a part which begins in free text may need at least."""


class Matcher:
    """The grammar's state after the tokens of one answer.

    Near its last token (from its first, where its budget is not large) it keeps a *plan*: a completion that fits into
    the tokens that are left. A token after which no completion would fit is not taken; the plan's first token is, in
    its place. So an answer whose shortest form fits at the start is complete at the end. What is forced, planned and
    replaced depends on the tokens and their number alone, so an answer that another process takes up goes on as it
    would have here.

    Args:
        inner: at the beginning, and of this answer alone: what following it costs is counted in it.
        eos_token_ids: what may end an answer; the first is taken where one must.
        plan: a completion from there, or None if none was found: then nothing is known of the end.
        max_tokens: of the answer, its end of sequence included.
        may_be_cut: where the answer is complete, it may stop for want of tokens, without an end of sequence: free text
            is cut where it would be without a grammar.
        reasoning: the bound on its reasoning.
    """

    def __init__(
        self,
        inner: "LLMatcher | UniqueKeys",
        closer: Closer,
        eos_token_ids: Sequence[int],
        plan: Sequence[int] | None,
        max_tokens: int,
        *,
        may_be_cut: bool = False,
        reasoning: ReasoningBound | None = None,
    ) -> None:
        self.inner = inner
        self._may_be_cut = may_be_cut
        self._reasoning = reasoning
        self._closer = closer
        self._eos_token_ids = eos_token_ids
        self._num_left = max_tokens
        self._near = NEAR + 4 * len(plan or ())
        self._plan = None if plan is None or max_tokens > self._near else list(plan)
        self._tried: tuple[int, list[int]] | None = None
        """The last token that was decided on, and the plan after it."""
        self._forced: list[int] = []
        with _limits_named():
            self._see_what_is_forced()

    @property
    def forced(self) -> Sequence[int]:
        """Tokens of which there is no choice: the grammar leaves none but how a text is cut, and it is cut as the
        tokenizer does; or nothing else would end in time."""
        return self._forced

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self.inner.is_accepting())

    def _error(self) -> str:
        return str(self.inner.get_error()).removesuffix("<non-verbose/>").strip()[:500]

    def check(self) -> None:
        """After a mask: see that it could be computed. One that could not allows the end alone.

        Raises:
            ShapeError: it takes too much.
        """
        if self.inner.is_error():
            raise ShapeError(f"cannot be followed here: {self._error()}")

    def decide(self, token_id: int) -> int:
        """`token_id`, which the grammar allows, or what must be taken in its place so that the answer can end.

        Raises:
            ShapeError: what follows takes too much to say.
        """
        if self._plan is None or self._forced or token_id in self._eos_token_ids:
            return token_id
        with _limits_named():
            after = self._plan_after(token_id)
        may_stop_after = self._may_be_cut and after == [] and self._num_left == 1
        if after is None or (len(after) + 1 >= self._num_left and not may_stop_after):
            return self._plan[0] if self._plan else self._eos_token_ids[0]
        self._tried = (token_id, after)
        return token_id

    def consume(self, token_id: int) -> None:
        """The answer goes on with this token.

        Raises:
            ShapeError: the grammar does not allow it, or following it takes too much.
        """
        is_end = token_id in self._eos_token_ids
        with _limits_named():
            if self._plan is not None and not is_end:
                self._plan = self._planned(token_id)
            self._tried = None
            if (is_end and not self.is_complete) or not self.inner.consume_token(token_id):
                raise ShapeError(f"cannot be followed here: {self._error() or 'it is not complete'}")
            self._num_left -= 1
            if self._reasoning is not None:
                self._reasoning.consume(token_id)
            if self._plan is None and self._looks_for_a_plan():
                self._plan = self._closer.completion(self.inner, self._num_left - 1, self._near)
            if self._forced:
                del self._forced[0]
            if not self._forced and not is_end:
                self._see_what_is_forced()

    def _looks_for_a_plan(self) -> bool:
        behind = self._near - self._num_left
        return behind >= 0 and behind % _OFTEN == 0

    def _planned(self, token_id: int) -> list[int] | None:
        plan, tried = self._plan, self._tried
        if plan and plan[0] == token_id:
            return plan[1:]
        return tried[1] if tried is not None and tried[0] == token_id else self._plan_after(token_id)

    def _see_what_is_forced(self) -> None:
        plan = self._plan
        if plan is not None and len(plan) + 1 >= self._num_left and not (self._may_be_cut and not plan):
            self._forced = [*plan, self._eos_token_ids[0]]
            return
        if self._reasoning is not None and self._reasoning.is_spent:
            end = [*self._reasoning.end]
            if self.inner.validate_tokens(end) == len(end):  # not inside a character
                self._forced = end
                return
        forced = list(self.inner.compute_ff_tokens())
        if plan is not None and forced and plan[: len(forced)] != forced:
            other = self._closer.completion(self.inner, self._num_left - 1, len(plan))
            if other is None or len(other) < len(forced):
                return  # the same text, cut in fewer tokens
            self._plan = other
        self._forced = forced

    def _plan_after(self, token_id: int) -> list[int] | None:
        """A completion from beyond a token, or None if none was found that fits."""
        inner, plan = self.inner, self._plan
        if inner.try_consume_tokens([token_id]) != 1:
            return plan
        found = plan if plan is not None and self._still_holds(plan) else None
        if found is None:
            expected = len(plan or ()) + (_PART if self._may_be_cut else 8)
            found = self._closer.completion(inner, self._num_left - 2 + self._may_be_cut, expected)
        inner.rollback(1)
        return found

    def _still_holds(self, plan: list[int]) -> bool:
        if not plan:
            return bool(self.inner.is_accepting())
        forced = self.inner.compute_ff_tokens()
        if forced and plan[: len(forced)] != forced:
            return False
        taken = self.inner.try_consume_tokens(plan)
        holds = taken == len(plan) and self.inner.is_accepting()
        if taken:
            self.inner.rollback(taken)
        return bool(holds)


@contextmanager
def _limits_named() -> Iterator[None]:
    """A panic of the library is the request's own fault, and no `Exception`."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ShapeError("cannot be followed here: its compiler failed") from error
