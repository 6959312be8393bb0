"""Tokens as TGI writes them: `{"id", "text", "logprob", "special"}`."""

from collections.abc import Sequence
from typing import Any

from quire.outputs import CompletionOutput, PositionLogprobs
from quire.server.doors.openai.choice_parts import LEAST_LOGPROB

Content = dict[str, Any]


class AnswerTokens:
    """The tokens of one sequence: the texts of those that are not special, joined, are its text.

    Args:
        tokenizer: of the engine.
        prompt_token_ids: what they continue.
        top: so many best tokens at each place.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._offsets = tokenizer.text_offsets(
            0, skip_special_tokens=True, spaces_between_special_tokens=True, prompt_token_ids=prompt_token_ids
        )

    def push(self, choice: CompletionOutput, *, ended: bool) -> list[tuple[Content, list[Content]]]:
        """What is new of the sequence: each token, and the best ones at its place.

        Args:
            ended: the last token takes what is left of the text (a stop string may end inside it).
        """
        made = []
        first, last = self._offsets.place, len(choice.token_ids) - 1
        logprobs = choice.logprobs or [{}] * len(choice.token_ids)
        for place, (token_id, position) in enumerate(zip(choice.token_ids, logprobs, strict=True)):
            begin = self._offsets.place
            self._offsets.push([token_id])
            end = None if ended and place == last else self._offsets.place - first
            text = choice.text[begin - first : end]
            made.append((self._token(token_id, position, text), self._best(position)))
        return made

    def _best(self, position: PositionLogprobs) -> list[Content]:
        ranked = sorted(position, key=lambda token_id: position[token_id].rank)
        best = [token_id for token_id in ranked if position[token_id].rank <= self._top][: self._top]
        return [self._token(token_id, position, self._tokenizer.token_text(token_id)) for token_id in best]

    def _token(self, token_id: int, position: PositionLogprobs, text: str) -> Content:
        special = token_id in self._tokenizer.special_token_ids
        return {
            "id": token_id,
            "text": self._tokenizer.token_text(token_id) if special else text,
            "logprob": max(position[token_id].logprob, LEAST_LOGPROB) if token_id in position else None,
            "special": special,
        }


def prefill_tokens(
    tokenizer: Any, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs | None]
) -> list[Content]:
    """The tokens of a prompt with their log-probabilities; nothing where they were not asked for."""
    return [
        {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "logprob": None if position is None else max(position[token_id].logprob, LEAST_LOGPROB),
        }
        for token_id, position in zip(token_ids, logprobs, strict=False)
    ]
