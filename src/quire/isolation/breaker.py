"""When to stop starting cores that die: a circuit breaker (Nygard, *Release It!*, 2007)."""

MOST_DEATHS_IN_A_ROW = 3
LONG_LIFE_SECONDS = 60.0
"""A core that lived this long did not die of what its predecessor died of."""
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
MOST_DEATHS_WAITED = 7
"""In a row, from outside: then the pause is the longest, and requests have waited for more than a minute."""


class Breaker:
    """Counts deaths without a token in between. Past the bound it is open: no core is started for a while, and each
    core that then dies in vain opens it again, for twice as long. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._num_deaths = self._num_by_itself = self._num_attributed = 0
        self._pause_s = FIRST_PAUSE_SECONDS
        self.open_until_s: float | None = None

    def record_success(self) -> None:
        """A core gave a token: it is of use, and not every request kills it."""
        self._num_deaths = self._num_by_itself = self._num_attributed = 0
        self._pause_s = FIRST_PAUSE_SECONDS

    def record_failure(self, started_s: float, now_s: float, *, by_itself: bool = True) -> None:
        """A core died for an unknown reason; or, not by itself, was killed from outside or could not be started."""
        if now_s - started_s >= LONG_LIFE_SECONDS:
            self.record_success()
        self._num_deaths += 1
        self._num_by_itself += by_itself
        if self._num_deaths >= MOST_DEATHS_IN_A_ROW:
            self.open_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_SECONDS)

    def record_attributed(self, started_s: float, now_s: float) -> None:
        """A core died, and its death is attributed to a request, which has failed. Attributed again and again, with
        no token in between, the deaths are not of the requests."""
        self._num_attributed += 1
        if self._num_attributed >= MOST_DEATHS_IN_A_ROW:
            self.record_failure(started_s, now_s)
        else:
            self._num_deaths = max(0, self._num_deaths - 1)
            self._num_by_itself = max(0, self._num_by_itself - 1)

    @property
    def lets_wait(self) -> bool:
        """Whether requests that are there already may wait while it is open: deaths from outside are no evidence
        against them, nor against the engine."""
        return self._num_by_itself < MOST_DEATHS_IN_A_ROW and self._num_deaths < MOST_DEATHS_WAITED

    def may_start(self, now_s: float) -> bool:
        """Whether a core may be started. Once the pause is over, it is open no more."""
        if self.open_until_s is not None and now_s >= self.open_until_s:
            self.open_until_s = None
        return self.open_until_s is None
