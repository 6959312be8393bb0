"""What an answer has cost so far: tokens and times, for each door to say in its own shape."""

from quire.outputs import RequestMetrics, RequestOutput


class Counted:
    """Counts the outputs of one answer.

    Args:
        num_prompts: requests that the answer is made of.
    """

    def __init__(self, num_prompts: int) -> None:
        self._num_open = num_prompts
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._metrics: dict[int, RequestMetrics | None] = {}
        self.num_tokens = 0
        """Generated."""
        self.num_sequences = 0
        """That have ended."""

    def see(self, number: int, output: RequestOutput) -> None:
        """What is new of prompt `number`: a difference, or all at once."""
        self._prompt_tokens[number] = len(output.prompt_token_ids)
        self._cached_tokens[number] = max(output.num_cached_tokens, self._cached_tokens.get(number, 0))
        self._metrics[number] = output.metrics
        self.num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
        self.num_sequences += sum(choice.finish_reason is not None for choice in output.outputs)
        self._num_open -= output.finished

    @property
    def finished(self) -> bool:
        """True when every prompt has had its last output."""
        return self._num_open == 0

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(self._prompt_tokens.values())

    @property
    def num_cached_tokens(self) -> int:
        """Of these, what the prefix cache supplied."""
        return sum(self._cached_tokens.values())

    def server_timing(self) -> str:
        """The times, as far as they are known, for the header `Server-Timing` (W3C), in milliseconds."""
        arrival, scheduled, first, last = self.clock()
        spans = {"queue": milliseconds(arrival, scheduled), "prefill": milliseconds(scheduled, first)}
        if self.finished:
            spans |= {"decode": milliseconds(first, last), "total": milliseconds(arrival, last)}
        return ", ".join(f"{name};dur={value:g}" for name, value in spans.items() if value is not None)

    def clock(self) -> tuple[float | None, float | None, float | None, float | None]:
        """The first arrival, the first leaving of the queue, the first token and the last, in seconds."""
        known = [item for item in self._metrics.values() if item is not None]
        scheduled = [item.first_scheduled_s for item in known if item.first_scheduled_s is not None]
        first = [item.first_token_s for item in known if item.first_token_s is not None]
        last = [item.last_token_s for item in known if item.last_token_s is not None]
        arrival = min((item.arrival_s for item in known), default=None)
        return arrival, min(scheduled, default=None), min(first, default=None), max(last, default=None)


def milliseconds(start_s: float | None, end_s: float | None) -> float | None:
    """Between two readings; None where one is not known."""
    return None if start_s is None or end_s is None else round(1000.0 * max(0.0, end_s - start_s), 3)
