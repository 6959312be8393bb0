"""Which matrix gets how many bits: the least loss within a budget, by what each costs and what each loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.errors import ConfigurationError
from quire.ops.types import QuantSpec
from quire.quant.types import quantized_bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """A format for a matrix: None leaves it as it is."""

    quant: QuantSpec | None
    num_bytes: int
    loss: float
    """KL divergence that it adds, nats a token."""


def format_bytes(quant: QuantSpec | None, out: int, inputs: int) -> int:
    """Of a matrix `[out, in]`; 16 bits a weight where it stays as it is."""
    return 2 * out * inputs if quant is None else quantized_bytes(quant, out, inputs)


def within_budget(
    choices: Mapping[str, Sequence[Choice]], weights: int, bits: float, kept_bytes: int = 0
) -> dict[str, Choice]:
    """One choice of each matrix: from the smallest of all on, whichever step lowers the loss most for its bytes, while
    `bits` a weight allow it.

    Args:
        weights: in all matrices together, those that are kept among them.
        kept_bytes: of these.

    Raises:
        ConfigurationError: the smallest choices take more.
    """
    chosen = {name: min(those, key=lambda one: (one.num_bytes, one.loss)) for name, those in choices.items()}
    limit, used = bits * weights / 8, kept_bytes + sum(one.num_bytes for one in chosen.values())
    if used > limit:
        least = used * 8 / weights
        raise ConfigurationError(f"bits is {bits:g}; the smallest formats take {least:.3f} a weight", field="bits")
    while True:
        steps = [
            ((chosen[name].loss - one.loss) / (one.num_bytes - chosen[name].num_bytes), name, one)
            for name, those in choices.items()
            for one in those
            if one.num_bytes > chosen[name].num_bytes
            and one.loss < chosen[name].loss
            and used + one.num_bytes - chosen[name].num_bytes <= limit
        ]
        if not steps:
            return chosen
        _, name, one = max(steps, key=lambda step: step[:2])
        used += one.num_bytes - chosen[name].num_bytes
        chosen[name] = one
