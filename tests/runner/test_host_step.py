"""The memory of a step, foretold from the architecture, beside the program that a loaded model is compiled to."""

from pathlib import Path

import pytest

from quire.ops import _native
from quire.ops.cpu import CpuOps
from quire.ops.graph.plan import plan_memory
from quire.ops.select import instruction_sets
from quire.runner import host_step
from quire.runner.host_step import host_step_bytes
from quire.weights.load import load_model, read_model_config
from tests.tiny.checkpoints import FAMILIES, make_tiny


@pytest.mark.parametrize("isa", [one for one in instruction_sets() if one in ("portable", "amx")])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_program_of_a_loaded_model_takes(family: str, isa: str, tmp_path: Path) -> None:
    directory = make_tiny(family, tmp_path, dtype="bfloat16")
    ops = CpuOps(1, isa)
    model = load_model(directory, ops, dtype="bfloat16", max_model_len=32)
    compiled = plan_memory(model._compute.program)  # type: ignore[attr-defined]
    foretold = host_step._plan(read_model_config(directory).spec, isa == "amx")
    assert (foretold.persistent_floats, foretold.local_floats) == (compiled.persistent_floats, compiled.local_floats)


def test_more_tokens_than_threads_take_at_once_share_the_local_buffers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer that is read again for each tile only where it is small."""
    monkeypatch.setattr(host_step, "available_cores", lambda: (2, ""))
    spec = read_model_config(tiny_model).spec
    least, most, most_bytes = _native.Program.token_tile
    few, many, more = (host_step_bytes(spec, 0, count) for count in (2 * least, 2 * most, 4 * most))
    of_step = (more - many) // (2 * most)
    of_tile = many // (2 * most) - of_step
    assert of_step == 4 * host_step._plan(spec, False).persistent_floats and of_tile > 0
    assert few == 2 * least * (of_step + of_tile)
    assert host_step_bytes(spec, most_bytes * 1000, 4 * most) == 4 * most * (of_step + of_tile)
