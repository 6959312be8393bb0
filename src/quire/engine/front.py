"""What `LLM` and `AsyncEngine` have in common: what is known of a model and its engine once both are there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quire.engine.channel import UNKNOWN_MODEL, ModelDescription
from quire.engine.engine import Engine
from quire.engine.inputs import InputProcessor, RequestLimits
from quire.errors import InvalidRequestError
from quire.outputs import Decision, Labels, Metric
from quire.sampling_params import SamplingParams
from quire.text.parsers.answer import AnswerFormat
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model's files say of it."""

    format: str
    """gguf, safetensors or engine."""
    num_bytes: int
    modified_s: float
    """Seconds since 1970."""
    fingerprint: str
    """64 hexadecimal digits that change when names, sizes or times of the files do."""
    directory: str
    """Where they are, without links."""
    model: ModelDescription = UNKNOWN_MODEL


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """What `quire.compose` makes of the arguments: an engine and what belongs to it."""

    engine: Engine
    inputs: InputProcessor
    tokenizer: Tokenizer | None
    limits: RequestLimits
    decisions: list[Decision]
    default_params: Mapping[str, Any]
    """Sampling defaults of the model's `generation_config.json`."""
    close: Callable[[], None]
    answers: AnswerFormat | None = None
    """How the model writes calls and reasoning; None without a tokenizer."""
    cache_config: Labels = ()
    """Of the core's cache, as its metric has it."""
    files: ModelFiles | None = None


class EngineFront:
    """A composed engine, as its callers see it."""

    def __init__(self, served: ServedEngine) -> None:
        self._served = served
        self._engine = served.engine

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._served.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._served.limits.vocab_size

    @property
    def model_files(self) -> ModelFiles | None:
        """What the model's files say of it, where they are known."""
        return self._served.files

    @property
    def prefix_block_size(self) -> int | None:
        """Tokens in a block of the prefix cache, which holds whole blocks of every prompt; None without one."""
        found = dict(self._served.cache_config)
        return int(found["block_size"]) if found.get("enable_prefix_caching") == "True" else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return self._served.limits.eos_token_ids

    @property
    def decisions(self) -> list[Decision]:
        """What was decided at start, and why."""
        return self._served.decisions

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequestError: the model has none.
        """
        if self._served.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer")
        return self._served.tokenizer

    @property
    def answer_format(self) -> AnswerFormat | None:
        """How the model writes calls of tools and reasoning; None without a tokenizer."""
        return self._served.answers

    @property
    def stated_sampling(self) -> Mapping[str, Any]:
        """The sampling parameters that the model's own files state."""
        return self._served.default_params

    def get_default_sampling_params(self) -> SamplingParams:
        """`SamplingParams` with the model's own defaults."""
        return SamplingParams.from_mapping(self._served.default_params)

    def get_metrics(self) -> list[Metric]:
        """All metrics now."""
        return self._engine.get_metrics()
