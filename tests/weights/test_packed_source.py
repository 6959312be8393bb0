"""A source is a protocol: weights that were packed before, in no file at all, make the same model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import ModelFileError
from quire.models.decoder import Decoder
from quire.models.parameters import Concatenated, Parameter, decoder_parameters
from quire.ops.cpu import CpuOps
from quire.ops.packed import PackedState
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.quant.select import select_scheme
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.load import load_model, load_weights, read_model_config
from quire.weights.pack import WeightPacker
from quire.weights.source import TensorInfo
from tests.models.paged import PagedModel
from tests.ops.packed_files import aligned_copy
from tests.tiny.checkpoints import make_tiny

TOKENS = list(range(30))


class PackedSource:
    """What an engine directory will be: matrices as they were packed, vectors as they were read."""

    def __init__(self, states: Mapping[str, PackedState], vectors: Mapping[str, Any]) -> None:
        self.states = states
        self.vectors = vectors
        self.tensors: dict[str, TensorInfo] = {}

    def size_bytes(self, parameter: Parameter) -> int:
        return 1

    def packed(self, name: str) -> PackedState | None:
        return self.states.get(name)

    def matrix(self, array: Concatenated) -> Any:
        raise AssertionError("every matrix is packed")

    def vector(self, array: Concatenated) -> Any:
        return self.vectors[array.tensors[0][0]]

    def differ(self, one: str, other: str) -> bool:
        return False

    def close(self) -> None:
        pass


def pack_before(directory: Path, packer: WeightPacker, parameters: Mapping[str, Parameter]) -> PackedSource:
    ops: Any = packer.ops
    norms = {n: p for n, p in parameters.items() if p.kind in ("rms_norm", "layer_norm")}
    with CheckpointWeights(directory) as source:
        weights = load_weights(parameters, source, packer)
        vectors = {array.tensors[0][0]: source.vector(array) for p in norms.values() for array in p.arrays}
    states = {n: ops.packed_state(w) for n, w in weights.items() if n not in norms}
    return PackedSource(
        {n: PackedState(s.header, tuple(aligned_copy(buffer) for buffer in s.buffers)) for n, s in states.items()},
        vectors,
    )


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "gemma2"])
@pytest.mark.parametrize("provider", ["native", "reference"])
def test_packed_weights_make_the_model_of_their_checkpoint(
    provider: str, family: str, quantization: str | None, tmp_path: Path
) -> None:
    ops: Ops = CpuOps(2, instruction_sets()[-1]) if provider == "native" else ReferenceOps(np)
    directory, scheme = make_tiny(family, tmp_path), select_scheme(quantization, None)
    config = read_model_config(directory)
    parameters = decoder_parameters(config.spec, config.names)
    packer = WeightPacker(ops, "float32", scheme, config.spec.norm.weight_offset)
    source = pack_before(directory, packer, parameters)
    seen: list[tuple[int, int]] = []
    weights = load_weights(parameters, source, packer, lambda *step: seen.append(step))
    assert seen == [(i + 1, len(parameters)) for i in range(len(parameters))]
    expected = load_model(directory, ops, "float32", 64, scheme=scheme)
    model = Decoder(config.spec, weights, ops, "float32", 64, expected.weight_bytes)
    logits = [
        PagedModel(one, ops, num_blocks=4, block_size=16).all_logits(TOKENS, [len(TOKENS)]) for one in (model, expected)
    ]
    assert np.array_equal(logits[0], logits[1])


def test_a_packed_weight_that_is_not_the_models_is_refused_by_its_tensor(tmp_path: Path) -> None:
    ops = ReferenceOps(np)
    directory = make_tiny("llama", tmp_path)
    config = read_model_config(directory)
    parameters = decoder_parameters(config.spec, config.names)
    packer = WeightPacker(ops, "float32", None, 0.0)
    source = pack_before(directory, packer, parameters)
    states = dict(source.states)
    for other, message in [
        (
            states["1.down"],
            r"^model\.layers\.1\.self_attn\.o_proj\.weight cannot be mapped: .*out_features, in_features",
        ),
        (PackedState(replace(states["1.o"].header, version=0), ()), "version is 0"),
        (PackedState(replace(states["1.o"].header, has_bias=True), ()), "has_bias is True"),
    ]:
        source.states = states | {"1.o": other}
        with pytest.raises(ModelFileError, match=message):
            load_weights(parameters, source, packer)
