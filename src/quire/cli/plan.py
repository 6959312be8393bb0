"""`quire plan`: memory and speed of a model on a device, from its configuration alone; `--check` runs it too."""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.cli import model_path
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import DTYPES, GROUP_SIZES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineArgs, what_would_fit
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.cli.machine_rates import Measured
    from quire.plan.devices import PlannedDevice
    from quire.plan.estimate import ModelCost

EXAMPLES = """examples:
  quire plan DIR
  quire plan DIR --quantization int4 --batch 1 8 32 --context 4k
  quire plan meta-llama/Llama-2-7b-hf --device a100-40
  quire plan DIR --check --batch 1 4 --context 256 1k --check-quantization none int8

The floor of a step is what memory and arithmetic allow at best. On a named device a prediction counts on four fifths of
that; for this machine on its own kernels' rates, which are measured for some seconds once and kept."""
REACHED = 0.8
"""Of the floor's rate of a device that is not here."""
SHARE = 0.9
"""Of the device's memory, as `gpu_memory_utilization` has it."""
CHUNK = 2048
"""Tokens of a prompt in a step, as `max_num_batched_tokens` has it."""
BLOCK = 16
"""Tokens of a block of the cache."""
START_BYTES = 6 * 2**20
"""What a start takes besides: its objects, the tables of positions, the buffers of threads (measured)."""
NONE = "none"
MOST = 2**24
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"a directory (config.json is enough), a GGUF file, a hub id or {EMBEDDED_NAME}"
    )
    parser.add_argument("--device", metavar="NAME", help="a device by name (left out: this machine, which is measured)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="left out: the weights are not quantised")
    parser.add_argument(
        "--quantization-group-size", type=int, choices=GROUP_SIZES, metavar="N", help="with int4, int4_min and int8"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of weights that are not quantised, and the cache"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=tuple(KV_CACHE_DTYPES), help="of the cache, if it is another one"
    )
    text = "tokens of each sequence: 2048, 4k (2k; several make a table)"
    parser.add_argument("--context", type=_size, nargs="+", default=[2048], metavar="N", help=text)
    parser.add_argument("--batch", type=_size, nargs="+", default=[1, 8, 32], metavar="N", help="sequences at once")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    parser.add_argument("--measure", action="store_true", help="measure this machine again, whatever is kept of it")
    parser.add_argument("--check", action="store_true", help="run the model here and print what was measured beside it")
    parser.add_argument(
        "--check-quantization", nargs="+", choices=(NONE, *QUANTIZATIONS), metavar="NAME",
        help=f"which to run (left out: that of --quantization): {NONE}, {', '.join(QUANTIZATIONS)}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([km]?)", text.lower(), re.ASCII)
    value = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to {MOST:,} (4k is 4,096)")
    return value


@dataclass(frozen=True, slots=True)
class Planned:
    """A device, and how fast steps are there."""

    device: "PlannedDevice"
    measured: "Measured | None"
    """Of this machine."""

    @property
    def by(self) -> str:
        """What predictions rest on."""
        return f"at {REACHED:.0%} of the floor's rate" if self.measured is None else "by this machine's kernels"

    def decode_s(self, cost: "ModelCost", batch: int, context: int) -> float:
        """Predicted time of a token of each sequence."""
        if self.measured is not None:
            return self.measured.rates.decode_s(cost, batch, context)
        return cost.decode(self.device, batch, context).seconds / REACHED

    def prefill_s(self, cost: "ModelCost", prompt: int) -> float:
        """Predicted time of a prompt, alone."""
        if self.measured is not None:
            return self.measured.rates.prefill_s(cost, prompt, CHUNK)
        return cost.prefill(self.device, prompt).seconds / REACHED


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    name = model_argument(options.model)
    model_path.check(name)
    for flag in ("check", "measure"):
        if getattr(options, flag) and options.device is not None:
            raise ConfigurationError(f"{flag} runs on this machine: leave out device", field=flag)
    if options.check_quantization and not options.check:
        raise ConfigurationError("check_quantization goes with --check", field="check_quantization")
    cost, planned = cost_of(options, name, options.quantization), _planned(options)
    facts, steps = dict(_facts(cost, planned, options)), list(_steps(cost, planned, options))
    checked: dict[str, Any] = {}
    if options.check:
        from quire.cli.plan_check import check

        checked = check(options, name, planned)
    if options.json:
        print(json.dumps({**facts, "steps": steps, **checked}, ensure_ascii=False))
        return 0
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    head = f"{'context':>8} {'batch':>6} {'floor, ms':>10} {'binds':>11} {'TPOT, ms':>9} {'tok/s':>8}"
    head += f" {'MiB':>9}" if options.device is None else ""
    print(f"\n{head}   ({planned.by})")
    for step in steps:
        tokens = f"{step['tpot_ms']:9.2f} {step['tokens_per_s']:8.0f}"
        tokens += f" {step['memory_mib']:9,.0f}" if options.device is None else ""
        print(f"{step['context']:8,} {step['batch']:6} {step['floor_ms']:10.2f} {step['binds']:>11} {tokens}")
    if checked:
        from quire.cli.plan_check import show

        show(checked)
    return 0


def _planned(options: argparse.Namespace) -> Planned:
    from quire.plan.devices import DEVICES

    if options.device is None:
        from quire.cli.machine_rates import machine_rates

        measured = machine_rates(options.measure)
        return Planned(measured.rates.device(), measured)
    if options.device not in DEVICES:
        text = f"device must be one of {', '.join(DEVICES)}, got {options.device[:40]!r}"
        raise ConfigurationError(text, field="device")
    return Planned(DEVICES[options.device], None)


def cost_of(options: argparse.Namespace, name: str | None, quantization: str | None) -> "ModelCost":
    """What a model costs, quantised so: of a checkpoint by its `config.json`, of a GGUF file or an engine by what its
    header says of each weight. No weight is read."""
    from quire.compose.engine_dir import as_built
    from quire.compose.served import find_model
    from quire.models.parameters import decoder_parameters
    from quire.ops.select import select_ops
    from quire.ops.types import BLOCK_FORMATS, CACHE_QMAX
    from quire.plan.estimate import ModelCost
    from quire.quant.select import scheme_for, select_cache_dtype, select_scheme
    from quire.weights.formats.quantized.source import foreseen
    from quire.weights.load import open_source, plan_weights, read_model_config
    from quire.weights.pack import WeightPacker

    group_size = options.quantization_group_size if quantization == options.quantization else None
    args = EngineArgs(
        model=name,
        revision=options.revision,
        dtype=options.dtype,
        quantization=quantization,
        quantization_group_size=group_size,
    )
    directory = find_model(args)
    config = read_model_config(directory)
    args, _ = as_built(args, config.manifest)
    ops, _ = select_ops("cpu", 1)
    scheme = select_scheme(args.quantization, args.quantization_group_size)
    formats = ops.formats
    if options.device is None:
        scheme = scheme_for(scheme, ops)
    else:
        if scheme is not None and scheme.linear.format in BLOCK_FORMATS:
            text = f"quantization {scheme.name!r} in groups, or with minima, runs on a CPU: leave out device"
            raise ConfigurationError(text, field="quantization")
        formats = tuple(name for name in formats if name != "fp8_groups")
    cache_dtype = select_cache_dtype(options.kv_cache_dtype, ops)
    if options.device is not None and cache_dtype in CACHE_QMAX:
        raise ConfigurationError("kv_cache_dtype of 8 bits runs on a CPU: leave out device", field="kv_cache_dtype")
    if config.gguf is not None or config.manifest is not None:
        with open_source(directory, config) as source:
            plan = plan_weights(config, source, ops, args.dtype, scheme)
            return ModelCost(plan.spec, plan.parameters, plan.packer, plan.given, kv_cache_dtype=cache_dtype)
    dtype: Any = config.dtype or "bfloat16" if args.dtype == "auto" else args.dtype
    stated = config.quantization if scheme is None and args.dtype != "float32" else None
    stays = None if stated is None else partial(foreseen, stated, formats)
    packer = WeightPacker(ops, dtype, scheme, config.spec.norm.weight_offset, stays)
    parameters = decoder_parameters(config.spec, config.names)
    return ModelCost(config.spec, parameters, packer, kv_cache_dtype=cache_dtype)


def _facts(cost: "ModelCost", planned: Planned, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    device, contexts = planned.device, options.context
    rates = ", ".join(f"{unit} {rate / 1e12:,.1f}" for unit, rate in device.operations_per_s.items())
    age = "" if planned.measured is None else f", {planned.measured.age(time.time())}"
    yield (
        "device",
        f"{device.name}: {device.memory_bytes / 2**30:,.1f} GiB, {device.read_bytes_per_s / 1e9:,.0f} GB/s{age}",
    )
    yield "operations", f"{rates} TOP/s; {cost.unit(device)} multiplies"
    yield "parameters", f"{cost.num_parameters:,}"
    yield "weights", f"{cost.weight_bytes / 1e9:,.3f} GB, {cost.read_bytes / 1e9:,.3f} GB read in a step"
    yield "cache", f"{cost.kv_bytes_per_token:,} bytes a token = {cost.kv_formula}"
    yield "operations a token", f"{cost.operations(1, 0, 1) / 1e9:,.2f} GFLOP, and attention"
    left = int(device.memory_bytes * SHARE) - cost.weight_bytes
    yield "sequences", "; ".join(_sequences(cost, left, context) for context in contexts)
    yield "TTFT", "; ".join(_first_token(cost, planned, context) for context in contexts)
    turn = cost.turning_batch(device, contexts[0])
    yield "turns", f"arithmetic binds from {turn:,} sequences on" if turn else "memory binds in a batch of any size"


def _first_token(cost: "ModelCost", planned: Planned, prompt: int) -> str:
    floor, predicted_s = cost.prefill(planned.device, prompt), planned.prefill_s(cost, prompt)
    times = f"{floor.seconds * 1e3:,.1f} ms at best, {predicted_s * 1e3:,.1f} ms {planned.by}"
    return f"{times}, for a prompt of {prompt:,} tokens alone ({floor.binds} binds)"


def _sequences(cost: "ModelCost", left: int, context: int) -> str:
    fitting = left // (cost.kv_bytes_per_token * context)
    if fitting > 0:
        return f"{fitting:,} of {context:,} tokens fit into {SHARE:.0%} of the memory beside the weights"
    return f"not one of {context:,} tokens fits: {what_would_fit(left, cost.kv_bytes_per_token, cost.weight_bytes)}"


def _steps(cost: "ModelCost", planned: Planned, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for context in options.context:
        for batch in options.batch:
            floor, predicted_s = cost.decode(planned.device, batch, context), planned.decode_s(cost, batch, context)
            yield {
                "batch": batch,
                "context": context,
                "floor_ms": floor.seconds * 1e3,
                "binds": floor.binds,
                "tpot_ms": predicted_s * 1e3,
                "tokens_per_s": batch / predicted_s,
                **({"memory_mib": memory_mib(cost, batch, context)} if options.device is None else {}),
            }


def memory_mib(cost: "ModelCost", batch: int, context: int) -> float:
    """Of a process on this CPU with a thread for each core: weights, the largest step, and the blocks of `batch`
    sequences of `context` tokens."""
    from quire.ops.select import available_cores
    from quire.runner.host_step import Host
    from quire.runner.memory import StepShape, estimated

    tokens = min(CHUNK, batch * context)
    shape, host = StepShape(batch, tokens, context, BLOCK), Host.of(cost.packer.ops, available_cores()[0])
    budget = estimated(cost.spec, cost.weight_bytes, cost.packer.dtype, shape, host)
    blocks = batch * -(-context // BLOCK)
    return float(budget.used + blocks * BLOCK * cost.kv_bytes_per_token + START_BYTES) / 2**20
