"""Fair sharing between callers: a virtual token counter for each (VTC: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024, arXiv 2401.00588, algorithm 2).

Each caller's counter grows with the tokens computed for it, divided by its weight; among callers whose requests
wait, the one with the smallest counter comes first. A caller that comes back from idleness is lifted to the smallest
counter of those who wait: nobody saves up claims. So the service of two callers that both have requests waiting
differs by no more than a constant, whatever lengths and rates they send.
"""

from collections.abc import Iterable

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
    """Counters by caller."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._floor = 0
        """The counter of whoever was last served from an otherwise empty queue."""
        self._forgotten = 0
        """The counter of a caller that has none of its own."""

    def __getitem__(self, caller: str) -> int:
        """The service that a caller was given, in units over its weight."""
        return self._counters.get(caller, self._forgotten)

    def arrive(self, caller: str, waiting: Iterable[str]) -> None:
        """A request comes; `waiting` are the callers who have others in the queue."""
        floor = min((self[other] for other in waiting if other != caller), default=self._floor)
        if len(self._counters) >= MAX_COUNTERS and caller not in self._counters:
            self._forgotten = max(self._forgotten, floor)
            self._counters = {name: count for name, count in self._counters.items() if count > self._forgotten}
        self._counters[caller] = max(self[caller], floor)

    def charge_prompt(self, new: NewRequest, num_tokens: int) -> None:
        """`num_tokens` of a prompt are about to be computed: a request enters for the first time."""
        self._charge(new, PROMPT_TOKEN_COST * num_tokens)
        self._floor = max(self._floor, self._counters[new.caller])

    def charge_output(self, new: NewRequest, num_tokens: int) -> None:
        """Tokens were generated."""
        self._charge(new, OUTPUT_TOKEN_COST * num_tokens)

    def _charge(self, new: NewRequest, cost: int) -> None:
        self._counters[new.caller] = self[new.caller] + cost * UNIT // new.caller_weight
