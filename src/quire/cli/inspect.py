"""`quire inspect`: what is inside a model's files or an engine directory. No weight is loaded."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import model_path
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import EngineArgs

if TYPE_CHECKING:
    from quire.weights.formats.engine_dir import Manifest
    from quire.weights.source import ModelConfig

EXAMPLES = """examples:
  quire inspect DIR
  quire inspect ENGINE --json"""


@dataclass(frozen=True, slots=True)
class Line:
    """One parameter of the decoder."""

    name: str
    shape: list[int]
    format: str
    num_bytes: int
    tensors: list[str] = field(default_factory=list)


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    text = f"a directory, an engine directory, a GGUF file, a hub id, smollm2 or {EMBEDDED_NAME}"
    parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print what is there."""
    from quire.compose.served import find_model
    from quire.weights.load import read_model_config

    name = model_argument(options.model)
    model_path.check(name)
    directory = find_model(EngineArgs(model=name, revision=options.revision))
    config = read_model_config(directory)
    spec = config.spec
    facts: dict[str, Any] = {
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": f"{spec.num_heads} of {spec.head_dim}, {spec.num_kv_heads} for keys and values",
        "vocabulary": spec.vocab_size,
        "positions": spec.max_position_embeddings,
    }
    if config.manifest is not None:
        facts |= _engine_facts(config.manifest)
    lines = list(_lines(directory, config))
    facts["weights"] = f"{sum(line.num_bytes for line in lines):,} bytes"
    if options.json:
        print(json.dumps({**facts, "parameters": [asdict(line) for line in lines]}, ensure_ascii=False))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    print()
    width, formats = max(len(line.name) for line in lines), max(len(line.format) for line in lines)
    for line in lines:
        shape = " x ".join(map(str, line.shape))
        print(f"{line.name:<{width}}  {line.format:<{formats}}  {shape:>14}  {line.num_bytes:>14,} bytes")
    return 0


def _engine_facts(manifest: "Manifest") -> dict[str, Any]:
    quantization = manifest.quantization or "none"
    if manifest.quantization_group_size:
        quantization += f", groups of {manifest.quantization_group_size}"
    golden = sorted({one.instruction_set for one in manifest.golden})
    return {
        "engine": f"built by quire {manifest.quire_version} from {manifest.model}",
        "target": f"{manifest.provider} {manifest.instruction_set}",
        "dtype": manifest.dtype,
        "quantization": quantization,
        "golden": f"{len(manifest.golden)} prompts on {', '.join(golden)}",
        **{one.name: f"{one.value}  ({one.reason})" for one in manifest.decisions},
    }


def _lines(directory: Path, config: "ModelConfig") -> Iterator[Line]:
    from quire.ops.select import select_ops
    from quire.weights.load import open_source, plan_weights

    ops, _ = select_ops("cpu", 1)
    with open_source(directory, config) as opened:
        plan = plan_weights(config, opened, ops)
        source = plan.source
        for name, parameter in plan.parameters.items():
            state = source.packed(name)
            shape, tensors = list(parameter.weight.shape), [tensor for tensor, _ in parameter.weight.tensors]
            if state is None:
                formats = " ".join(sorted({source.tensors[tensor].format for tensor in tensors}))
                yield Line(name, shape, formats, source.size_bytes(parameter), tensors)
            else:
                header = state.header
                format = f"{header.format} {header.layout}" + (f" g{header.group_size}" if header.group_size else "")
                format += f", was {' '.join(sorted({source.tensors[tensor].format for tensor in tensors}))}"
                yield Line(name, shape, format, sum(len(buffer) for buffer in state.buffers), tensors)
