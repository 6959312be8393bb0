"""From what was asked of a build to a plan in which each matrix has its format: rounded, calibrated, or left as it
is."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quire.build.calibrate.calibrator import Calibrator
from quire.build.calibrate.chosen import ChosenWeights, MatrixPlan
from quire.build.calibrate.measure import measured_choices
from quire.build.calibrate.text import Contexts
from quire.build.calibrate.walk import LINEAR
from quire.config import GROUP_SIZES
from quire.errors import ConfigurationError
from quire.models.parameters import Parameter
from quire.ops.types import Provider, QuantSpec
from quire.outputs import Decision
from quire.quant.calibrate.budget import format_bytes, within_budget
from quire.weights.load import WeightPlan
from quire.weights.loading_bar import LoadingBar
from quire.weights.source import DecidedSource

INT8 = QuantSpec("int8", None)


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is asked of a build beside its scheme.

    Args of `quire build`.
    """

    contexts: Contexts | None = None
    """To calibrate with; None rounds to nearest."""
    bits: float | None = None
    """Of a weight in the linear layers, scales included, on average; None gives all of them the scheme's format."""
    keep: Sequence[str] = ()
    """Patterns of tensors that stay in the dtype."""
    group_size: int | None = None
    """That was asked for: with `bits`, the only one then."""
    is_quiet: bool = False
    """No word of how far it is."""


def treated_plan(plan: WeightPlan, provider: Provider, treatment: Treatment, folder: Path) -> WeightPlan:
    """The plan over the weights as they will be. Calibrates now, where that was asked for.

    Args:
        folder: for what calibration makes, until it is read.

    Raises:
        ConfigurationError: a pattern matches nothing, or the budget is too small; it names the argument.
    """
    scheme = plan.packer.scheme
    if scheme is None:
        raise ConfigurationError(
            "keep, calibrate and bits are for a model that is quantised: quantization is not set", field="keep"
        )
    if treatment.contexts is not None and plan.quantized is not None:
        raise ConfigurationError(
            "calibrate: this checkpoint is quantised already: calibrate the one it was made of", field="calibrate"
        )
    kept = _kept(plan, treatment.keep)
    matrices = {}
    for name, parameter in plan.parameters.items():
        if name in kept:
            matrices[name] = MatrixPlan(None, f"kept: {kept[name]}")
        elif parameter.kind in LINEAR:
            matrices[name] = MatrixPlan(scheme.linear, "" if treatment.contexts else "rounded to nearest")
        elif parameter.kind == "embedding":
            matrices[name] = MatrixPlan(scheme.embedding, "rounded to nearest")
    chosen = ChosenWeights(plan, provider, folder, matrices)
    if treatment.contexts is not None:
        folder.mkdir()
        if treatment.bits is not None:
            _share_bits(chosen, provider, treatment, scheme.linear)
        with LoadingBar("Calibrating", lines=True, is_quiet=treatment.is_quiet) as bar:
            Calibrator(chosen, provider, bar.show).run(treatment.contexts.token_ids)
    chosen.remarks += _remarks(chosen, treatment)
    source: DecidedSource = chosen
    return replace(plan, source=source, quantized=source, packer=replace(plan.packer, scheme=None))


def _kept(plan: WeightPlan, patterns: Sequence[str]) -> dict[str, str]:
    """The matrices that patterns name, by their tensors or modules, with the pattern."""
    found: dict[str, str] = {}
    for pattern in patterns:
        names = [name for name, one in plan.parameters.items() if _is_matrix(one) and _matches(one, pattern)]
        if not names:
            matrices = filter(_is_matrix, plan.parameters.values())
            some = sorted({module.rpartition(".")[2] for one in matrices for module in _modules(one)})
            text = f"keep: no matrix of the model matches {pattern[:80]!r}; its matrices end in {', '.join(some)}"
            raise ConfigurationError(text, field="keep")
        found |= {name: pattern for name in names if name not in found}
    return found


def _matches(parameter: Parameter, pattern: str) -> bool:
    tensors = [tensor for tensor, _ in parameter.weight.tensors]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (*tensors, *_modules(parameter)))


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.weight.shape) == 2


def _modules(parameter: Parameter) -> list[str]:
    return [tensor.removesuffix(".weight") for tensor, _ in parameter.weight.tensors]


def _share_bits(chosen: ChosenWeights, provider: Provider, treatment: Treatment, base: QuantSpec) -> None:
    plan = chosen.plan
    linear = {name: one.weight.shape for name, one in plan.parameters.items() if one.kind in LINEAR}
    weights = sum(out * inputs for out, inputs in linear.values())
    free = [name for name in linear if chosen.matrices[name].quant is not None]
    kept_bytes = sum(format_bytes(None, *shape) for name, shape in linear.items() if name not in free)
    sizes = GROUP_SIZES if treatment.group_size is None else (treatment.group_size,)
    formats = [*(replace(base, group_size=size) for size in sizes), INT8]
    assert treatment.contexts is not None and treatment.bits is not None
    with LoadingBar("Measuring what each matrix costs", lines=True, is_quiet=treatment.is_quiet) as bar:
        choices = measured_choices(plan, provider, treatment.contexts.token_ids, free, base, formats, bar.show)
    for name, choice in within_budget(choices, weights, treatment.bits, kept_bytes).items():
        loss = f"KL of {choice.loss:.1e} if rounded alone"
        chosen.matrices[name] = MatrixPlan(choice.quant, f"; {loss}" if choice.quant else "as the budget allows")


def _remarks(chosen: ChosenWeights, treatment: Treatment) -> list[Decision]:
    linear = {name: one.weight.shape for name, one in chosen.plan.parameters.items() if one.kind in LINEAR}
    num_bytes = sum(format_bytes(chosen.matrices[name].quant, *shape) for name, shape in linear.items())
    bits = 8 * num_bytes / sum(out * inputs for out, inputs in linear.values())
    asked = "" if treatment.bits is None else f"; {treatment.bits:g} asked for, shared by measured loss"
    found = [Decision("bits", f"{bits:.3f}", f"a weight of the linear layers, scales included{asked}")]
    if treatment.contexts is not None:
        found.append(
            Decision(
                "calibration", f"{treatment.contexts.num_tokens:,} tokens", f"of {treatment.contexts.name}, by GPTQ"
            )
        )
    return found
