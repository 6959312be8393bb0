"""What an answer has cost so far: usage in OpenAI's shape, timings in llama.cpp's."""

from typing import Any

from quire.server.answers.counts import Counted, milliseconds


class Usage(Counted):
    """Counts the outputs of one answer.

    Args:
        num_prompts: requests that the answer is made of.
        shows_cached: whether usage tells what the prefix cache supplied.
        prompt_only: what was sampled is not shown, and does not count.
    """

    def __init__(self, num_prompts: int, *, shows_cached: bool, prompt_only: bool = False) -> None:
        super().__init__(num_prompts)
        self._shows_cached = shows_cached
        self._prompt_only = prompt_only

    def counts(self) -> dict[str, Any]:
        """OpenAI's usage, so far."""
        prompt, answer = self.num_prompt_tokens, 0 if self._prompt_only else self.num_tokens
        counted: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }
        if self._shows_cached:
            counted["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        return counted

    def timings(self) -> dict[str, Any]:
        """llama.cpp's timings, with the wait in the queue and the time to the first token.

        `prompt_ms` runs from leaving the queue to the first token, `predicted_ms` from the first token to the last.
        """
        arrival, scheduled, first, last = self.clock()
        cached = self.num_cached_tokens
        prompt_ms, predicted_ms = milliseconds(scheduled, first), milliseconds(first, last)
        prompt_n, gaps = self.num_prompt_tokens - cached, self.num_tokens - max(1, self.num_sequences)
        found = {
            "queue_ms": milliseconds(arrival, scheduled),
            "ttft_ms": milliseconds(arrival, first),
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
            "prompt_per_second": _ratio(1000.0 * prompt_n, prompt_ms),
            "predicted_n": self.num_tokens,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": _ratio(predicted_ms, gaps),
            "predicted_per_second": _ratio(1000.0 * gaps, predicted_ms),
        }
        return {**found, "cache_n": cached} if self._shows_cached else found


def _ratio(amount: float | None, count: float | None) -> float | None:
    return None if amount is None or not count or count < 0 else round(amount / count, 3)
