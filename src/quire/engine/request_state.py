"""The text side of a request that runs: deltas of tokens in, `RequestOutput`s out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quire.core.plan import TokenDelta, TokenLogprobs
from quire.core.request import NewRequest, ResumeState
from quire.engine.inputs import ParsedRequest
from quire.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput
from quire.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from quire.text.detokenizer import IncrementalDetokenizer, StopSearch, StopStrings
from quire.text.tokenizer import Tokenizer


class SequenceText:
    """Text of one sequence: detokenised as it comes, cut at stop strings."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, stops: StopStrings, prompt_token_ids: Sequence[int]
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._stops = StopSearch(stops)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text that is certain, and the stop string that ended it, if one did."""
        pieces = []
        for token_id in token_ids:
            self._num_tokens += 1
            may_stop = self._num_tokens >= self._min_tokens
            text, stop = self._stops.push(self._detokenizer.push((token_id,)), may_match=may_stop)
            pieces.append(text)
            if stop is not None:
                return "".join(pieces), stop
        return "".join(pieces), None

    def flush(self) -> tuple[str, str | None]:
        """What was held back, at the end."""
        text, stop = self._stops.push(self._detokenizer.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)


class RepetitionDetector:
    """Looks whether the last tokens of a sequence are one pattern, `min_count` times in a row.

    For each size of a pattern it counts for how many tokens each has equalled the one that many places before: so a
    token costs one comparison a size, whatever the count.
    """

    def __init__(self, params: RepetitionDetectionParams) -> None:
        self._sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
        self._min_count = params.min_count
        self._equal = [0] * len(self._sizes)
        self._tokens: list[int] = []

    def push(self, token_ids: Sequence[int]) -> bool:
        """Take tokens; whether the last of them completed a pattern."""
        found = False
        for token_id in token_ids:
            found = self._push(token_id)
        return found

    def _push(self, token_id: int) -> bool:
        tokens, found = self._tokens, False
        for index, size in enumerate(self._sizes):
            if size > len(tokens):
                break
            if tokens[-size] != token_id:
                self._equal[index] = 0
            else:
                self._equal[index] += 1
                found = found or self._equal[index] >= size * (self._min_count - 1)
        tokens.append(token_id)
        return found


@dataclass(slots=True)
class SequenceState:
    """One of the `n` sequences of a request, as far as it has come."""

    index: int
    text: SequenceText | None
    repetition: RepetitionDetector | None = None
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_s: float | None = None
    has_changed: bool = False
    """Something changed since the last output."""
    reported_pieces: int = 0
    """How much of `pieces` a DELTA stream has been given; `reported_tokens` likewise of tokens and logprobs."""
    reported_tokens: int = 0


class RequestState:
    """A request of `n` sequences between its first delta and its last output.

    `apply` takes deltas, `output` says what the caller should see. After the sequence's final delta nothing
    more is accepted for it: the core sends exactly one.
    """

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer | None, arrival_s: float) -> None:
        params = parsed.params
        self.parsed = parsed
        self.metrics = RequestMetrics(arrival_s)
        self.error: str | None = None
        self.num_faults = 0
        """Faults of the engine that it has lived through."""
        self._tokenizer = tokenizer
        self._prompt_token_ids = list(parsed.sequences[0].prompt_token_ids)  # one list for all outputs
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._sequences = {
            new.request_id: SequenceState(
                index,
                SequenceText(tokenizer, params, stops, new.prompt_token_ids)
                if params.detokenize and tokenizer is not None
                else None,
                None if params.repetition_detection is None else RepetitionDetector(params.repetition_detection),
                logprobs=None if params.logprobs is None else [],
                cumulative_logprob=None if params.logprobs is None else 0.0,
            )
            for index, new in enumerate(parsed.sequences)
        }

    @property
    def finished(self) -> bool:
        """True when every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences.values())

    def token_came(self, sequence_id: str, now_s: float) -> float | None:
        """A sequence's tokens came: seconds since its last ones, or None when they are its first."""
        sequence = self._sequences[sequence_id]
        before, sequence.last_token_s = sequence.last_token_s, now_s
        return None if before is None else now_s - before

    def num_tokens(self, sequence_id: str) -> int:
        """Tokens generated so far for one sequence, by the core's id."""
        return len(self._sequences[sequence_id].token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt_token_ids)

    @property
    def longest(self) -> int:
        """Tokens generated for the longest sequence."""
        return max(len(sequence.token_ids) for sequence in self._sequences.values())

    def resumed(self, sequence_id: str) -> tuple[NewRequest, str | None]:
        """For another core: a sequence, as it goes on from what was applied; its finish reason, if it does not."""
        sequence = self._sequences[sequence_id]
        num_prompt_logprobs = 0
        if sequence.index == 0 and self._prompt_logprobs is not None:
            num_prompt_logprobs = len(self._prompt_logprobs) - 1
        given = ResumeState(tuple(sequence.token_ids), num_prompt_logprobs, self._num_cached_tokens)
        return replace(self.parsed.sequences[sequence.index], resume=given), sequence.finish_reason

    def apply(self, delta: TokenDelta) -> str | None:
        """Take a delta in. The finish reason, if the sequence has ended: by the core's word, at a stop string, or
        because it repeats itself."""
        sequence = self._sequences[delta.request_id]
        if sequence.finish_reason is not None:
            return None
        sequence.has_changed = True
        if sequence.index == 0:  # the others find what this one computed
            self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs and sequence.index == 0 and self._prompt_logprobs is not None:
            self._prompt_logprobs += [self._position(item) for item in delta.prompt_logprobs]
        sequence.token_ids += delta.token_ids
        if sequence.logprobs is not None and sequence.cumulative_logprob is not None:
            sequence.logprobs += [self._position(item) for item in delta.logprobs]
            sequence.cumulative_logprob += sum(item.logprobs[0] for item in delta.logprobs)
        stopped = self._push_text(sequence, delta)
        if not stopped and delta.finish_reason is not None:
            sequence.finish_reason, sequence.stop_reason = delta.finish_reason, delta.stop_reason
            self.error = self.error or delta.error
            return delta.finish_reason
        if sequence.repetition is not None and not stopped and self._repeats(sequence, sequence.repetition, delta):
            sequence.finish_reason, sequence.stop_reason = "repetition", "repetition_detected"
        return sequence.finish_reason

    def output(self) -> RequestOutput | None:
        """What a caller of this `output_kind` is given now; None when that is nothing."""
        kind, finished = self.parsed.params.output_kind, self.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        sequences = list(self._sequences.values())
        if kind is RequestOutputKind.DELTA:
            if self._awaits_prompt and not any(item.finish_reason == "error" for item in sequences):
                return None
            sequences = [item for item in sequences if item.has_changed]
        outputs = [_completion(item, delta=kind is RequestOutputKind.DELTA) for item in sequences]
        return RequestOutput(
            request_id=self.parsed.request_id,
            prompt=self.parsed.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            finished=finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self.metrics,
            error=self.error,
        )

    @property
    def _awaits_prompt(self) -> bool:
        """Log-probabilities of a prompt that takes several steps come in parts: a first difference has them whole."""
        known = self._prompt_logprobs
        return known is not None and len(known) < len(self._prompt_token_ids) and not self.finished

    def _push_text(self, sequence: SequenceState, delta: TokenDelta) -> bool:
        if sequence.text is None:
            return False
        token_ids = delta.token_ids
        if delta.finish_reason == "stop" and not self.parsed.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        text, stop = sequence.text.push(token_ids)
        if stop is None and delta.finish_reason is not None:
            rest, stop = sequence.text.flush()
            text += rest
        if text:
            sequence.pieces.append(text)
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop
        return stop is not None

    def _repeats(self, sequence: SequenceState, detector: RepetitionDetector, delta: TokenDelta) -> bool:
        """Whether it repeats itself; its text is then complete."""
        if not detector.push(delta.token_ids):
            return False
        if len(sequence.token_ids) < self.parsed.params.min_tokens:
            return False
        if sequence.text is not None:
            sequence.pieces.append(sequence.text.flush()[0])
        return True

    def _position(self, item: TokenLogprobs) -> PositionLogprobs:
        text_of = self._tokenizer.token_text if self._tokenizer is not None else lambda _: ""
        found: PositionLogprobs = {}
        for token_id, logprob, rank in zip(item.token_ids, item.logprobs, item.ranks, strict=True):
            found.setdefault(token_id, Logprob(logprob, rank, text_of(token_id)))
        return found


def _completion(sequence: SequenceState, *, delta: bool) -> CompletionOutput:
    pieces, tokens = (sequence.reported_pieces, sequence.reported_tokens) if delta else (0, 0)
    sequence.has_changed = False
    if delta:
        sequence.reported_pieces, sequence.reported_tokens = len(sequence.pieces), len(sequence.token_ids)
    return CompletionOutput(
        index=sequence.index,
        text="".join(sequence.pieces[pieces:]),
        token_ids=sequence.token_ids[tokens:],
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[tokens:],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
