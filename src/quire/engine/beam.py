"""Beam search over any engine: the beams of a prompt are requests of one token each, and the best are gone on with.

As transformers does it (`num_beams`, `early_stopping=False`): a sequence that ends is kept if it is among the best
`beam_width` of its step; the search stops when no open beam can be better than the worst one kept, judged by its
present length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.errors import InvalidRequestError
from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from quire.text.detokenizer import IncrementalDetokenizer
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Beam:
    """One sequence, open or ended."""

    token_ids: tuple[int, ...]
    """Without the prompt."""
    logprob: float
    """Of all of them together."""
    finish_reason: str | None = None


class BeamSearch:
    """The search of one prompt.

    Args:
        params: as they were asked for.
        room: tokens that fit behind the prompt.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, params: BeamSearchParams, room: int, eos_token_ids: Sequence[int]) -> None:
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._width, self._penalty = params.beam_width, params.length_penalty
        self._max_tokens = min(params.max_tokens, room)
        self._ended: list[Beam] = []
        self.open = [Beam((), 0.0)]
        """Beams whose next token is asked for; none when the search has ended."""

    @property
    def step(self) -> SamplingParams:
        """The parameters of the one token of each open beam."""
        count = self._width + len(self._eos)
        if count > MAX_LOGPROBS:
            raise InvalidRequestError(f"beam_width may be at most {MAX_LOGPROBS - len(self._eos)}", param="beam_width")
        return SamplingParams(max_tokens=1, temperature=0.0, logprobs=count, ignore_eos=True, detokenize=False)

    def advance(self, found: Sequence[PositionLogprobs]) -> None:
        """Go on with the best continuations.

        Args:
            found: of each open beam, its most probable next tokens.
        """
        candidates = [
            Beam((*beam.token_ids, token_id), beam.logprob + one.logprob)
            for beam, position in zip(self.open, found, strict=True)
            for token_id, one in position.items()
        ]
        candidates.sort(key=lambda beam: beam.logprob, reverse=True)
        length = len(self.open[0].token_ids) + 1
        ends = [beam.token_ids[-1] in self._eos or length == self._max_tokens for beam in candidates]
        for beam, has_ended in zip(candidates[: self._width], ends, strict=False):
            if has_ended:
                reason = "stop" if beam.token_ids[-1] in self._eos else "length"
                self._ended.append(Beam(beam.token_ids, beam.logprob, reason))
        self._ended = sorted(self._ended, key=self.score, reverse=True)[: self._width]
        going = [beam for beam, has_ended in zip(candidates, ends, strict=True) if not has_ended][: self._width]
        if going and len(self._ended) == self._width:
            could_be = going[0].logprob / length**self._penalty
            going = going if could_be > self.score(self._ended[-1]) else []
        self.open = going

    def score(self, beam: Beam) -> float:
        """By which sequences are compared."""
        found: float = beam.logprob / len(beam.token_ids) ** self._penalty
        return found

    @property
    def best(self) -> list[Beam]:
        """The sequences that ended, best first."""
        return self._ended

    def output(self, request_id: str, prompt_token_ids: Sequence[int], tokenizer: Tokenizer | None) -> RequestOutput:
        """What was found, as one request with as many sequences, best first."""
        found = [
            CompletionOutput(
                index,
                _text(tokenizer, prompt_token_ids, beam.token_ids),
                list(beam.token_ids),
                beam.logprob,
                finish_reason=beam.finish_reason,
            )
            for index, beam in enumerate(self.best)
        ]
        return RequestOutput(request_id, None, list(prompt_token_ids), found, finished=True)


def _text(tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    if tokenizer is None:
        return ""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt_token_ids)
    return detokenizer.push(token_ids) + detokenizer.flush()
