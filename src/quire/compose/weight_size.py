"""How large a model's weights become, before it is loaded: what the loader will pack, by the headers of its files."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from quire.compose.engine_dir import as_built
from quire.config import EngineArgs
from quire.errors import QuireError
from quire.ops.select import select_ops
from quire.quant.select import scheme_for, select_scheme
from quire.weights.load import open_source, plan_weights, read_model_config


def weight_bytes(args: EngineArgs, path: Path) -> int:
    """Bytes of all weights in memory. 0 for a model that cannot be loaded: the core that tries to says why.

    Args:
        path: a directory, or a GGUF file.
    """
    try:
        return _weight_bytes(args, path)
    except QuireError:
        return 0


def _weight_bytes(args: EngineArgs, path: Path) -> int:
    config = read_model_config(path)
    args, _ = as_built(args, config.manifest)
    # Those of the processors, whatever computes: sizes are the same, and a device would be opened here.
    ops, _ = select_ops("cpu", 1)
    scheme, is_host = select_scheme(args.quantization, args.quantization_group_size), computes_on_host(args)
    with open_source(path, config) as source:
        plan = plan_weights(config, source, ops, args.dtype, scheme_for(scheme, ops) if is_host else scheme)
        if config.quantization is not None and scheme is None and args.dtype != "float32":
            from quire.weights.formats.quantized.source import foreseen  # not above: few models are quantised ones

            formats = tuple(name for name in ops.formats if is_host or name != "fp8_groups")
            packer = replace(plan.packer, foreseen=partial(foreseen, config.quantization, formats))
            plan = replace(plan, packer=packer)
        return plan.num_bytes


def computes_on_host(args: EngineArgs) -> bool:
    """Whether the processors compute for certain."""
    return args.device == "cpu" or not Path("/dev/nvidia0").exists()
