"""Exercise 2.2: a scheduler. Check it with `quire course check 2.2`.

It decides, step by step, how many tokens of each request the model computes. A request knows `num_prompt_tokens`
tokens when it comes. A step that has computed all that it knows samples one more token, which the next step computes,
and so on until it ends. There are no phases: a request is "computed" chasing "known".

The loop around it:

    plan = scheduler.schedule()             # {"a": 1, "b": 200}
    ... the model computes these tokens ...
    scheduler.update(sampled, ended)        # "a" and "b" have one more token; "a" has ended with it
"""

from collections.abc import Sequence


class Scheduler:
    """Continuous batching over a budget of tokens.

    Args:
        max_num_seqs: requests that may be running: begun, and not ended.
        max_num_batched_tokens: the budget: tokens that one step computes at most; not less than `max_num_seqs`.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        raise NotImplementedError

    def add(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request comes; it waits until it is begun."""
        raise NotImplementedError

    def schedule(self) -> dict[str, int]:
        """The tokens of each request in the next step; a request without any is left out.

        1. Never more tokens than the budget, nor more than a request knows and has not computed yet.
        2. Running requests come before waiting ones, in the order in which they came: what is missing of each, as far
           as the budget lasts. A prompt that does not fit is computed in pieces.
        3. So no answer waits for a prompt: a running request that lacks one token gets it in every step.
        4. Then waiting requests begin, in the order in which they came, while fewer than `max_num_seqs` run and some
           budget is left.
        """
        raise NotImplementedError

    def update(self, sampled: Sequence[str], ended: Sequence[str]) -> None:
        """What became of the step: its tokens are computed.

        Args:
            sampled: requests that know one token more.
            ended: requests that are done: they give up their place. A client may leave at any time, so some of them
                may never have begun.
        """
        raise NotImplementedError
