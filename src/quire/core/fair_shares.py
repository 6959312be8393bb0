"""Fair sharing between callers: a virtual token counter for each (VTC: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024, arXiv 2401.00588, algorithm 2).

Each caller's counter grows with the tokens computed for it, divided by its weight; among callers whose requests
wait, the one with the smallest counter comes first. A caller that comes back from idleness is lifted to the smallest
counter of those that wait: no caller saves up claims. So the service of two callers that both have requests waiting
differs by no more than a constant, whatever lengths and rates they send.
"""

from collections.abc import Collection

from quire.core.request import NewRequest

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2
"""The weights of the paper: a prompt's tokens are computed many at a time."""
UNIT = 2**20
"""Counters are whole numbers; one is this part of a prompt token's cost at weight 1."""
MAX_WEIGHT = 1000
MAX_COUNTERS = 4096
"""Counters of idle callers beyond these are forgotten; the lift gives them back all that matters."""


class FairShares:
    """A counter of service for each caller."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._floor = 0
        """The most that a caller had been given when a request of it entered: the lift where no caller waits."""

    def __getitem__(self, caller: str) -> int:
        """The service that a caller was given, in units over its weight."""
        return self._counters.get(caller, 0)

    def arrive(self, caller: str, waiting: Collection[str]) -> None:
        """A request comes; `waiting` are the callers that have others in the queue. A caller among them keeps its
        claim: only one that comes back is lifted."""
        floor = min((self._counters.get(other, 0) for other in waiting), default=self._floor)
        if len(self._counters) >= MAX_COUNTERS and caller not in self._counters:
            kept = {name: count for name, count in self._counters.items() if count > floor or name in waiting}
            self._counters = kept
        self._counters[caller] = max(self._counters.get(caller, 0), floor)

    def charge_prompt(self, new: NewRequest, num_tokens: int) -> None:
        """`num_tokens` of a prompt are about to be computed: a request enters for the first time."""
        self._charge(new, PROMPT_TOKEN_COST * num_tokens)
        self._floor = max(self._floor, self._counters[new.caller])

    def charge_output(self, new: NewRequest, num_tokens: int) -> None:
        """`num_tokens` of its output were generated."""
        self._charge(new, OUTPUT_TOKEN_COST * num_tokens)

    def _charge(self, new: NewRequest, cost: int) -> None:
        self._counters[new.caller] = self[new.caller] + cost * UNIT // new.caller_weight
