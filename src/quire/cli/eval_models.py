"""The models of `quire eval`: loaded as `LLM` loads them, read together, then timed in turns."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from quire.bench.eval_loss import Loss, measure_losses
from quire.bench.eval_report import Row, Table
from quire.bench.eval_text import OF_EMBEDDED, PACKAGED, Window, read_text, windows_of
from quire.bench.offline import Measurement, run_quire
from quire.bench.turns import Run, take_turns
from quire.bench.workloads import HIGHEST_ID, WORKLOADS, longest, warm_up
from quire.cli.arguments import EMBEDDED_NAME
from quire.compose.core import CoreParts, compose_core
from quire.compose.served import find_model
from quire.compose.text import compose_text
from quire.config import EngineArgs
from quire.errors import ConfigurationError
from quire.models.parameters import Parameter
from quire.ops.select import select_ops
from quire.runner.teacher_forcing import STEP_TOKENS
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.engine_dir import read_manifest
from quire.weights.formats.engine_names import is_engine
from quire.weights.load import open_source, plan_weights, read_model_config
from quire.weights.value_grid import grid_of

CONTEXT = 1024
BESIDE_CONTEXT = 512
"""The longest rows that the embedded model was trained on."""
CAVEATS = {
    "Q4_1": "a minimum and 15 equal steps for each 32 weights, as Q4_1 has it",
    "4-bit": "at most 16 values for each 32 weights",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for, checked as far as it can be before a model is opened."""

    models: Sequence[str | None]
    reference: str | None
    formats: Mapping[str, Mapping[str, Any]]
    """As they were written -> their engine arguments."""
    text: Path | None
    """None: the packaged one."""
    tokens: int
    context: int | None
    stride: int | None
    workloads: Sequence[str]
    reps: int
    quiet: bool

    @property
    def shared(self) -> dict[str, Any]:
        """Engine arguments of the reference: where it comes from and what computes it."""
        given = next(iter(self.formats.values()))
        return {name: given[name] for name in ("tokenizer", "revision", "device", "threads") if name in given}


def evaluate(asked: Options) -> tuple[Table, bool]:
    """Load the reference and every model in every format, and measure them. Also: whether the weights of the reference
    had been rounded to a grid of 4 bits.

    Raises:
        ConfigurationError: naming what cannot be measured.
    """
    exact_args = EngineArgs(model=asked.reference, dtype="float32", **asked.shared)
    names = _names(asked.models)
    cases = {
        f"{name} {word}" if len(names) > 1 else word: EngineArgs.from_mapping({"model": model, **values})
        for model, name in names.items()
        for word, values in asked.formats.items()
    }
    args = [*cases.values()]
    stored, grid = _stored(exact_args)
    windows, text = _windows(asked, exact_args, args)
    weight_bytes, losses = _losses(asked, windows, exact_args, args)
    rates = _rates(asked, cases)
    rows = [Row(*values) for values in zip(cases, weight_bytes, losses[1:], rates, strict=True)]
    shown = _shown(asked.reference)
    notes = []
    if grid is not None:
        notes.append(
            f"The weights of {shown} had been rounded before: they have {CAVEATS[grid]}. A format on that grid loses "
            "nothing here, and every other loses more than it would on the original weights."
        )
    reference = f"{shown} in float32 (stored as {stored})"
    return Table(", ".join(names.values()), reference, losses[0], text, rows, notes), grid is not None


def beside(asked: Options) -> list[Table]:
    """The same formats of the embedded model, which was trained in bfloat16: for figures without that caveat."""
    if find_spec("quire.demo") is None or asked.reference is None:
        return []
    formats = {
        word: {name: value for name, value in one.items() if name not in ("tokenizer", "revision")}
        for word, one in asked.formats.items()
    }
    context = min(asked.context or CONTEXT, BESIDE_CONTEXT)
    stride = None if asked.stride is None else min(asked.stride, context)
    table, _ = evaluate(replace(asked, models=[None], reference=None, formats=formats, context=context, stride=stride))
    own = " The text is of its own answers." if asked.text is None else ""
    note = "The embedded model, trained in bfloat16, for comparison: its weights had not been rounded before." + own
    return [replace(table, notes=[*table.notes, note])]


def _names(models: Sequence[str | None]) -> dict[str | None, str]:
    """What each model is called: the end of its path, or all of it where two end alike."""
    short = {model: _shown(model) for model in models}
    return short if len(set(short.values())) == len(short) else {model: model or EMBEDDED_NAME for model in short}


def _shown(model: str | None) -> str:
    return EMBEDDED_NAME if model is None else PurePath(model).name or model


def _stored(args: EngineArgs) -> tuple[str, str | None]:
    """How the files of the reference hold its matrices, and the grid of its values.

    Raises:
        ConfigurationError: it cannot be had in float32.
    """
    path = find_model(args)
    if is_engine(path):
        manifest = read_manifest(path)
        if (manifest.dtype, manifest.quantization) != ("float32", None):
            text = f"{_shown(args.model)} was built as {manifest.quantization or manifest.dtype}"
            text = f"{text}, so it has no float32 reference: name its model with --reference"
            raise ConfigurationError(text, field="reference")
    config, (ops, _) = read_model_config(path), select_ops("cpu", 1)
    with open_source(path, config) as source:
        plan = plan_weights(config, source, ops, "float32")
        tensors = [name for one in plan.parameters.values() if len(one.weight.shape) == 2 for name in _tensors(one)]
        formats = {plan.source.tensors[name].format for name in tensors if name in plan.source.tensors}
        return ", ".join(sorted(formats)) or "an engine", grid_of(plan)


def _tensors(parameter: Parameter) -> list[str]:
    return [name for name, _ in parameter.weight.tensors]


def _windows(asked: Options, exact: EngineArgs, args: Sequence[EngineArgs]) -> tuple[list[Window], str]:
    """The text in tokens, on which all models agree, cut."""
    text = read_text(asked.text or (OF_EMBEDDED if asked.reference is None else PACKAGED))
    tokenizer = _tokenizer(exact)
    token_ids, prefix = tokenizer.encode(text, add_special_tokens=False), _prefix(tokenizer)
    for one in {(other.model, other.tokenizer): other for other in args}.values():
        if (one.model, one.tokenizer) != (exact.model, exact.tokenizer):
            other = _tokenizer(one)
            if (other.encode(text, add_special_tokens=False), _prefix(other)) != (token_ids, prefix):
                names = f"{_shown(one.model)} and {_shown(exact.model)}"
                text = f"the tokenizers of {names} cut this text differently: compare them in runs of their own"
                raise ConfigurationError(text, field="models")
    positions = min(read_model_config(find_model(one)).spec.max_position_embeddings for one in (exact, *args))
    for workload in asked.workloads:
        if (least := longest(WORKLOADS[workload](0, HIGHEST_ID))) > positions:
            text = f"workload {workload} needs {least} positions; the model has {positions}: leave out --table"
            raise ConfigurationError(text, field="workload")
    context = min(CONTEXT, positions) if asked.context is None else asked.context
    if context > positions:
        raise ConfigurationError(f"context is {context:,}; the model has {positions:,} positions", field="context")
    stride = max(context - len(prefix), 1) if asked.stride is None else asked.stride
    windows = windows_of(token_ids[: asked.tokens], context, stride, prefix)
    name = asked.text.name if asked.text else "the packaged one"
    cut = f", its first {asked.tokens:,} tokens" if len(token_ids) > asked.tokens else ""
    predicted = sum(window.num_predicted for window in windows)
    return windows, f"{name}{cut}: {predicted:,} predicted tokens in contexts of {context:,}, stride {stride:,}"


def _tokenizer(args: EngineArgs) -> Tokenizer:
    found = compose_text(args, find_model(args)).tokenizer
    if found is None:
        raise ConfigurationError(f"{_shown(args.model)} has no tokenizer: name one with --tokenizer", field="tokenizer")
    return found


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return whole[: next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)]


def _losses(
    asked: Options, windows: Sequence[Window], exact: EngineArgs, args: Sequence[EngineArgs]
) -> tuple[list[int], list[Loss]]:
    """Bytes of each model's weights; the losses of the reference, then of each model. All are in memory at once."""
    size = max(len(window.token_ids) for window in windows)
    loaded: list[CoreParts] = []
    for one in (exact, *args):
        sized = replace(
            one,
            max_model_len=size,
            max_num_seqs=1,
            max_num_batched_tokens=STEP_TOKENS,
            num_gpu_blocks_override=-(-size // one.block_size),
        )
        _say(asked, f"loading {_shown(one.model)} ({len(loaded) + 1} of {1 + len(args)})")
        loaded.append(compose_core(sized, find_model(one)))
    readers = [parts.teacher.logits for parts in loaded]
    losses = measure_losses(readers[0], readers[1:], windows, partial(_progress, asked))
    return [parts.teacher.model.weight_bytes for parts in loaded[1:]], losses


def _rates(asked: Options, cases: Mapping[str, EngineArgs]) -> list[dict[str, list[float]]]:
    """Output tokens per second of each model, by workload. All are in memory at once, and one computes at a time."""
    if not asked.workloads:
        return [{} for _ in cases]
    from quire.llm import LLM

    def show(run: Measurement) -> None:
        _say(asked, f"{run.workload} {run.engine} {run.output_tokens_per_second:.1f} tok/s")

    items = [item for workload in asked.workloads for item in WORKLOADS[workload](0, HIGHEST_ID)]
    with ExitStack() as stack:
        engines: dict[str, Run] = {}
        for name, one in cases.items():
            num_blocks = sum(-(-longest([item]) // one.block_size) + 1 for item in items)
            sized = replace(one, max_model_len=longest(items), max_num_seqs=32, num_gpu_blocks_override=num_blocks)
            llm = stack.enter_context(LLM(**{item.name: getattr(sized, item.name) for item in fields(sized)}))
            engines[name] = partial(run_quire, llm)
            engines[name](warm_up(llm.vocab_size))
        found = {one: take_turns(engines, one, asked.reps, llm.vocab_size, show) for one in asked.workloads}
    return [
        {one: [run.output_tokens_per_second for run in runs if run.engine == name] for one, runs in found.items()}
        for name in cases
    ]


def _say(asked: Options, text: str) -> None:
    if not asked.quiet:
        print(f"  {text}", file=sys.stderr)


def _progress(asked: Options, done: int, total: int) -> None:
    if not asked.quiet and sys.stderr.isatty():
        print(f"\r  read {done:,} of {total:,} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)
