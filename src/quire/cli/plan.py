"""`quire plan`: memory and speed of a model on a device, from its configuration alone; `--check` runs it too."""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.cli import model_path
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import DTYPES, GROUP_SIZES, QUANTIZATIONS, EngineArgs
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quire.models.parameters import Parameter
    from quire.ops.types import QuantizedFormat, QuantSpec
    from quire.outputs import RequestMetrics, RequestOutput
    from quire.plan.devices import PlannedDevice
    from quire.plan.estimate import Floor, ModelCost
    from quire.weights.source import ModelConfig

EXAMPLES = """examples:
  quire plan DIR
  quire plan DIR --quantization int4 --batch 1 8 32 --context 4096
  quire plan meta-llama/Llama-2-7b-hf --device a100-40
  quire plan DIR --check

The floor of a step is what memory and arithmetic allow at best; kernels reach some four fifths of it. Without --device
this machine is measured for two seconds."""
REACHED = 0.8
"""Of the floor's rate, that a prediction counts on."""
SHARE = 0.9
"""Of the device's memory, as `gpu_memory_utilization` has it."""
CHECKED_TOKENS = 64


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"a directory (config.json is enough), a GGUF file, a hub id or {EMBEDDED_NAME}"
    )
    parser.add_argument("--device", metavar="NAME", help="a device by name (left out: this machine, which is measured)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="left out: the weights are not quantised")
    parser.add_argument(
        "--quantization-group-size", type=int, choices=GROUP_SIZES, metavar="N", help="with int4 and int8"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of weights that are not quantised, and the cache"
    )
    parser.add_argument("--context", type=_positive, default=2048, metavar="N", help="tokens of each sequence (2048)")
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 32], metavar="N", help="sequences at once")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    parser.add_argument("--check", action="store_true", help="run the model here and print what was measured beside it")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 2**24:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to {2**24:,}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    name = model_argument(options.model)
    model_path.check(name)
    device, cost = _device(options.device), _cost(options, name)
    if options.check and options.device is not None:
        raise ConfigurationError("check runs on this machine: leave out device", field="check")
    facts, steps = dict(_facts(cost, device, options)), list(_steps(cost, device, options))
    measured = _measured(options, name) if options.check else {}
    if options.json:
        print(json.dumps({**facts, "steps": steps, **measured}, ensure_ascii=False))
        return 0
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    print(
        f"\n{'batch':>6} {'floor, ms':>10} {'binds':>11} {'TPOT, ms':>9} {'tok/s':>8}   (at {REACHED:.0%} of the floor)"
    )
    for step in steps:
        tokens = f"{step['tpot_ms']:9.2f} {step['tokens_per_s']:8.0f}"
        print(f"{step['batch']:6} {step['floor_ms']:10.2f} {step['binds']:>11} {tokens}")
    for key, value in measured.items():
        print(f"{key}  {value}")
    return 0


def _device(name: str | None) -> "PlannedDevice":
    from quire.plan.devices import DEVICES, PlannedDevice

    if name is not None:
        if name not in DEVICES:
            raise ConfigurationError(f"device must be one of {', '.join(DEVICES)}, got {name[:40]!r}", field="device")
        return DEVICES[name]
    from quire.bench.roofline import measure_roofline
    from quire.ops.cpu import CpuOps
    from quire.ops.select import select_ops
    from quire.runner.host_memory import host_memory_bytes

    ops, _ = select_ops("cpu", None)
    assert isinstance(ops, CpuOps)
    found = measure_roofline(ops.probe, time.perf_counter)
    return PlannedDevice("this machine", host_memory_bytes(), found.read_bytes_per_s, found.operations_per_s)


def _cost(options: argparse.Namespace, name: str | None) -> "ModelCost":
    from quire.compose.engine_dir import as_built
    from quire.compose.served import find_model
    from quire.models.parameters import decoder_parameters
    from quire.ops.select import select_ops
    from quire.plan.estimate import ModelCost
    from quire.quant.select import select_scheme
    from quire.weights.load import read_model_config
    from quire.weights.pack import WeightPacker

    args = EngineArgs(
        model=name,
        revision=options.revision,
        dtype=options.dtype,
        quantization=options.quantization,
        quantization_group_size=options.quantization_group_size,
    )
    directory = find_model(args)
    args, _ = as_built(args, directory)
    config = read_model_config(directory)
    dtype: Any = config.dtype or "bfloat16" if args.dtype == "auto" else args.dtype
    ops, _ = select_ops("cpu", 1)
    scheme = select_scheme(args.quantization, args.quantization_group_size)
    stays = None if scheme is not None or args.dtype == "float32" else _foreseen(directory, config, ops.formats)
    packer = WeightPacker(ops, dtype, scheme, config.spec.norm.weight_offset, stays)
    return ModelCost(config.spec, decoder_parameters(config.spec, config.names), packer)


def _foreseen(
    path: "Path", config: "ModelConfig", formats: "tuple[QuantizedFormat, ...]"
) -> "Callable[[Parameter], QuantSpec | None] | None":
    """What a file that is quantised already keeps of each matrix; None where it is not."""
    from quire.weights.source import Target

    if config.is_gguf:
        from quire.weights.formats.gguf import GgufWeights
        from quire.weights.formats.gguf_packed import GgufBlocks

        with GgufWeights(path, config.rotated_heads) as weights:  # its header alone is needed
            return GgufBlocks(weights, Target("bfloat16", formats, None)).quantized
    if config.quantization is None:
        return None
    from quire.weights.formats.quantized.source import foreseen

    return partial(foreseen, config.quantization, formats)


def _facts(cost: "ModelCost", device: "PlannedDevice", options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    spec, context = cost.spec, options.context
    rates = ", ".join(f"{unit} {rate / 1e12:,.1f}" for unit, rate in device.operations_per_s.items())
    yield "device", f"{device.name}: {device.memory_bytes / 1e9:,.0f} GB, {device.read_bytes_per_s / 1e9:,.0f} GB/s"
    yield "operations", f"{rates} TOP/s; {cost.unit(device)} multiplies"
    yield "parameters", f"{cost.num_parameters:,}"
    yield "weights", f"{cost.weight_bytes / 1e9:,.3f} GB, {cost.read_bytes / 1e9:,.3f} GB read in a step"
    formula = f"2 x {spec.num_layers} layers x {spec.num_kv_heads} heads x {spec.head_dim} x {cost.kv_item_bytes} bytes"
    yield "cache", f"{cost.kv_bytes_per_token:,} bytes a token = {formula}"
    yield "operations a token", f"{cost.operations(1, 0, 1) / 1e9:,.2f} GFLOP, and attention"
    left = device.memory_bytes * SHARE - cost.weight_bytes
    fitting = int(left // (cost.kv_bytes_per_token * context))
    if fitting > 0:
        yield "sequences", f"{fitting:,} of {context:,} tokens fit into {SHARE:.0%} of the memory beside the weights"
    else:
        yield "sequences", f"not one of {context:,} tokens fits: {_instead(cost, device, left)}"
    prompt = cost.prefill(device, context)
    yield "TTFT", f"{_ms(prompt)} for a prompt of {context:,} tokens, alone ({prompt.binds} binds)"
    turn = cost.turning_batch(device, context)
    yield "turns", f"arithmetic binds from {turn:,} sequences on" if turn else "memory binds in a batch of any size"


def _instead(cost: "ModelCost", device: "PlannedDevice", left: float) -> str:
    """What would fit."""
    if left > cost.kv_bytes_per_token:
        return f"--max-model-len {int(left // cost.kv_bytes_per_token)} would"
    need = cost.weight_bytes - device.memory_bytes * SHARE
    return f"the weights alone exceed it by {max(0.0, need) / 1e9:,.1f} GB; --quantization int8 halves them, int4 again"


def _ms(floor: "Floor") -> str:
    return f"{floor.seconds / REACHED * 1e3:,.1f} ms"


def _steps(cost: "ModelCost", device: "PlannedDevice", options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in options.batch:
        floor = cost.decode(device, batch, options.context)
        predicted_s = floor.seconds / REACHED
        yield {
            "batch": batch,
            "floor_ms": floor.seconds * 1e3,
            "binds": floor.binds,
            "tpot_ms": predicted_s * 1e3,
            "tokens_per_s": batch / predicted_s,
        }


def _measured(options: argparse.Namespace, name: str | None) -> dict[str, str]:
    """TPOT of each batch in this process, with sequences as long as the context.

    Raises:
        ConfigurationError: the model is shorter.
    """
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

    found = {}
    args = {"quantization": options.quantization, "dtype": options.dtype, "revision": options.revision}
    if options.quantization == "int4":
        args["quantization_group_size"] = options.quantization_group_size
    with LLM(model=name, max_num_seqs=max(options.batch), enable_prefix_caching=False, **args) as llm:
        prompt_tokens = options.context - CHECKED_TOKENS // 2
        if not 1 <= prompt_tokens <= llm.max_model_len - CHECKED_TOKENS:
            limits = f"{CHECKED_TOKENS // 2 + 1} to {llm.max_model_len - CHECKED_TOKENS // 2}"
            raise ConfigurationError(f"context must be from {limits} to be checked", field="context")
        prompt = {"prompt_token_ids": [1 + number % (llm.vocab_size - 1) for number in range(prompt_tokens)]}
        params = SamplingParams(temperature=0.0, max_tokens=CHECKED_TOKENS, ignore_eos=True, detokenize=False)
        for batch in options.batch:
            outputs = llm.generate([prompt] * batch, params, use_tqdm=False)
            # The last to begin decodes beside all the others.
            first_s, last_s = max((one.first_token_s or 0.0, one.last_token_s or 0.0) for one in map(_metrics, outputs))
            tpot_s = (last_s - first_s) / (CHECKED_TOKENS - 1)
            found[f"measured, batch {batch}"] = f"{tpot_s * 1e3:,.2f} ms a token, {batch / tpot_s:,.0f} tok/s"
    return found


def _metrics(output: "RequestOutput") -> "RequestMetrics":
    assert output.metrics is not None
    return output.metrics
