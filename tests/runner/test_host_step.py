"""The memory of a step, foretold from the architecture, beside the program that a loaded model is compiled to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.models.parameters import NameMap, decoder_parameters
from quire.ops import _native
from quire.ops.cpu import CpuOps
from quire.ops.graph.fuse import fuse
from quire.ops.graph.operations import trace
from quire.ops.graph.plan import plan_memory
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.runner.host_step import Host, host_step_bytes
from quire.runner.memory import StepShape, make_budget
from quire.weights.load import load_model, read_model_config
from tests.tiny.checkpoints import FAMILIES, make_tiny


@pytest.mark.parametrize("isa", [one for one in instruction_sets() if one in ("baseline", "amx")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_program_of_a_loaded_model_takes(family: str, dtype: Any, isa: str, tmp_path: Path) -> None:
    """With a step so small that no tile is: each token has all of its buffers, and its rounded activations."""
    directory = make_tiny(family, tmp_path)
    ops = CpuOps(1, isa)
    model = load_model(directory, ops, dtype=dtype, max_model_len=32)
    compiled = plan_memory(fuse(trace(model.compute)))
    spec = model.spec
    widest = spec.num_heads * spec.head_dim
    if isa != "amx" or dtype != "bfloat16":
        widest = max(widest, spec.hidden_size, spec.intermediate_size)
    foretold = host_step_bytes(spec, model.weight_bytes, dtype, 10, Host.of(ops))
    assert foretold == 10 * (4 * (compiled.persistent_floats + compiled.local_floats) + 2 * widest)


def test_many_layers_take_no_more_than_few(tmp_path: Path) -> None:
    """And the first of them tell the share of the weights that lies between two attentions."""
    directory = make_tiny("llama", tmp_path, num_hidden_layers=9)
    ops = CpuOps(2, "baseline")
    model = load_model(directory, ops, dtype="float32", max_model_len=32)
    compiled = plan_memory(fuse(trace(model.compute)))
    widest = max(model.spec.num_heads * model.spec.head_dim, model.spec.hidden_size, model.spec.intermediate_size)
    foretold = host_step_bytes(model.spec, model.weight_bytes, "float32", 10, Host.of(ops))
    assert foretold == 10 * (4 * (compiled.persistent_floats + compiled.local_floats) + 2 * widest)
    most, most_bytes = _native.Program.token_tile[1:]
    parameters = decoder_parameters(model.spec, NameMap())
    of_layer = sum(one.size for name, one in parameters.items() if name.startswith("4."))
    limit = most_bytes * sum(one.size for one in parameters.values()) // of_layer
    small, large = (host_step_bytes(model.spec, limit + by, "float32", 4 * most, Host.of(ops)) for by in (-1000, 1000))
    assert small < large, "a segment of so many bytes is still taken tile by tile"


def test_more_tokens_than_threads_take_at_once_share_the_local_buffers(tiny_model: Path) -> None:
    """Of a layer that is read again for each tile only where it is small."""
    spec, host = read_model_config(tiny_model).spec, Host(2, "baseline")
    least, most, most_bytes = _native.Program.token_tile

    def taken(count: int, host: Host = host, weight_bytes: int = 0) -> int:
        return host_step_bytes(spec, weight_bytes, "float32", count, host)

    few, many, more = (taken(count) for count in (2 * least, 2 * most, 4 * most))
    of_step = (more - many) // (2 * most)
    of_tile = many // (2 * most) - of_step
    compiled = plan_memory(fuse(trace(load_model(tiny_model, CpuOps(2, "baseline"), dtype="float32").compute)))
    assert of_step == 4 * compiled.persistent_floats and of_tile > 0
    assert few == 2 * least * (of_step + of_tile)
    assert taken(4 * most, Host(3, "baseline")) == more + most * of_tile, "a thread more, a tile more"
    assert taken(4 * most, weight_bytes=most_bytes * 1000) == 4 * most * (of_step + of_tile)


def test_it_is_asked_of_the_provider_that_computes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_ISA", "bogus")
    assert Host.of(CpuOps(3, "baseline")) == (3, "baseline") and Host.of(ReferenceOps(np)) == (1, "")
    assert Host.of(CpuOps(1, "baseline"), 5) == (5, "baseline")
    shape = StepShape(max_num_seqs=3, max_num_batched_tokens=2000, max_model_len=32, block_size=16)
    ops = CpuOps(3, "baseline")
    model = load_model(tiny_model, ops, dtype="float32")
    foretold = host_step_bytes(model.spec, model.weight_bytes, "float32", 2000, Host(3, "baseline"))
    assert make_budget(model, ops, shape).activations == foretold
