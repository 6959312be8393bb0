"""What an answer has cost so far: usage in OpenAI's shape, timings in llama.cpp's."""

from typing import Any

from quire.outputs import RequestMetrics, RequestOutput


class Usage:
    """Counts the outputs of one answer.

    Args:
        num_prompts: requests that the answer is made of.
        shows_cached: whether usage tells what the prefix cache supplied.
        prompt_only: what was sampled is not shown, and does not count.
    """

    def __init__(self, num_prompts: int, *, shows_cached: bool, prompt_only: bool = False) -> None:
        self._shows_cached = shows_cached
        self._prompt_only = prompt_only
        self._num_open = num_prompts
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._metrics: dict[int, RequestMetrics | None] = {}
        self._num_tokens = 0
        self._num_sequences = 0

    def see(self, number: int, output: RequestOutput) -> None:
        """What is new of prompt `number`: a difference, or all at once."""
        self._prompt_tokens[number] = len(output.prompt_token_ids)
        self._cached_tokens[number] = max(output.num_cached_tokens, self._cached_tokens.get(number, 0))
        self._metrics[number] = output.metrics
        self._num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
        self._num_sequences += sum(choice.finish_reason is not None for choice in output.outputs)
        self._num_open -= output.finished

    @property
    def finished(self) -> bool:
        """True when every prompt has had its last output."""
        return self._num_open == 0

    def counts(self) -> dict[str, Any]:
        """OpenAI's usage, so far."""
        prompt, answer = sum(self._prompt_tokens.values()), 0 if self._prompt_only else self._num_tokens
        counted: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }
        if self._shows_cached:
            counted["prompt_tokens_details"] = {"cached_tokens": sum(self._cached_tokens.values())}
        return counted

    def timings(self) -> dict[str, Any]:
        """llama.cpp's timings, with the wait in the queue and the time to the first token.

        `prompt_ms` runs from leaving the queue to the first token, `predicted_ms` from the first token to the last.
        """
        arrival, scheduled, first, last = self._clock()
        cached = sum(self._cached_tokens.values())
        prompt_ms, predicted_ms = _ms(scheduled, first), _ms(first, last)
        prompt_n, gaps = sum(self._prompt_tokens.values()) - cached, self._num_tokens - max(1, self._num_sequences)
        found = {
            "queue_ms": _ms(arrival, scheduled),
            "ttft_ms": _ms(arrival, first),
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
            "prompt_per_second": _ratio(1000.0 * prompt_n, prompt_ms),
            "predicted_n": self._num_tokens,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": _ratio(predicted_ms, gaps),
            "predicted_per_second": _ratio(1000.0 * gaps, predicted_ms),
        }
        return {**found, "cache_n": cached} if self._shows_cached else found

    def server_timing(self) -> str:
        """The same, as far as it is known, for the header `Server-Timing` (W3C), in milliseconds."""
        arrival, scheduled, first, last = self._clock()
        spans = {"queue": _ms(arrival, scheduled), "prefill": _ms(scheduled, first)}
        if self.finished:
            spans |= {"decode": _ms(first, last), "total": _ms(arrival, last)}
        return ", ".join(f"{name};dur={value:g}" for name, value in spans.items() if value is not None)

    def _clock(self) -> tuple[float | None, float | None, float | None, float | None]:
        """The first arrival, the first leaving of the queue, the first token and the last."""
        known = [item for item in self._metrics.values() if item is not None]
        scheduled = [item.first_scheduled_s for item in known if item.first_scheduled_s is not None]
        first = [item.first_token_s for item in known if item.first_token_s is not None]
        last = [item.last_token_s for item in known if item.last_token_s is not None]
        arrival = min((item.arrival_s for item in known), default=None)
        return arrival, min(scheduled, default=None), min(first, default=None), max(last, default=None)


def _ms(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else round(1000.0 * max(0.0, end_s - start_s), 3)


def _ratio(amount: float | None, count: float | None) -> float | None:
    return None if amount is None or not count or count < 0 else round(amount / count, 3)
