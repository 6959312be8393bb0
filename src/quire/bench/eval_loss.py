"""What a format loses: perplexity, KL divergence of the next token and agreement on it, against float32 on one text.

Every prediction is teacher-forced: the model reads the text itself, not its own answers. Probabilities are of the whole
vocabulary and in float64, a few rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.bench.eval_text import Window
from quire.errors import RequestFailedError

Forced = Callable[[Sequence[int], int], Iterator[NDArray[np.float32]]]
"""A model: `quire.runner.teacher_forcing.TeacherForcing.logits`. All that are compared give as many rows at a time."""


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities of each row `[rows, vocabulary]`."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass(slots=True)
class Loss:
    """What has been seen of one model, a number for each predicted token."""

    nll: list[NDArray[np.float64]] = field(default_factory=list)
    """Negative log-likelihoods of the text's own tokens, nats."""
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    """KL(reference || model) over the vocabulary, nats."""
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    """Whether the most probable token is the reference's."""

    def add(self, exact: "Exact", found: NDArray[np.float64], targets: Sequence[int]) -> None:
        """Some tokens: what the reference says, log-probabilities of the model `[targets, vocabulary]`, the text's."""
        self.nll.append(-found[np.arange(len(targets)), targets])
        self.kl.append(np.einsum("rv,rv->r", exact.probs, exact.log_probs - found))
        self.same.append(exact.best == found.argmax(axis=-1))

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return sum(map(len, self.nll))

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return float(np.exp(np.concatenate(self.nll).mean()))

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(np.concatenate(self.kl).mean())

    @property
    def p99_kl(self) -> float:
        """Of a hundred tokens, all but one diverge less."""
        return float(np.quantile(np.concatenate(self.kl), 0.99))

    @property
    def agreement(self) -> float:
        """The share of tokens on which the most probable one is the reference's."""
        return float(np.concatenate(self.same).mean())


class Exact:
    """What the reference says of some tokens.

    Args:
        logits: float32 `[tokens, vocabulary]`.
    """

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.log_probs = log_probs(logits)
        self.probs = np.exp(self.log_probs)
        self.best = self.log_probs.argmax(axis=-1)


def measure_losses(
    reference: Forced, others: Sequence[Forced], windows: Sequence[Window], show: Callable[[int, int], None]
) -> list[Loss]:
    """Of the reference, then of each other model; all read the text together, so that none is computed twice.

    Args:
        show: called with the predicted tokens done, and those in all.

    Raises:
        RequestFailedError: logits that are not finite, or of another width than the reference's.
    """
    losses = [Loss() for _ in range(1 + len(others))]
    total = sum(window.num_predicted for window in windows)
    for window in windows:
        first = window.first
        chunks = zip(*(model(window.token_ids, first) for model in (reference, *others)), strict=True)
        for logits in chunks:
            for one in logits:
                _check(one, logits[0])
            exact, count = Exact(logits[0]), len(logits[0])
            targets = window.token_ids[first + 1 : first + 1 + count]
            losses[0].add(exact, exact.log_probs, targets)
            for loss, one in zip(losses[1:], logits[1:], strict=True):
                loss.add(exact, log_probs(one), targets)
            first += count
            show(losses[0].num_tokens, total)
    return losses


def _check(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
    if logits.shape != reference.shape:
        widths = f"{reference.shape[1]:,} and {logits.shape[1]:,} tokens"
        raise RequestFailedError(f"the models have vocabularies of {widths}: they cannot be compared")
    if not np.isfinite(logits).all():
        raise RequestFailedError("a model gives logits that are not finite on this text")
