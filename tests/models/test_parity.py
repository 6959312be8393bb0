"""Every family against transformers in float32 on a tiny random checkpoint with all of its features on.

A new family is one entry in `tests/tiny/checkpoints.py:FAMILIES`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.weights.load import load_model
from tests.models.paged import PagedModel
from tests.tiny.checkpoints import FAMILIES, LLAMA3_ROPE, VOCAB_SIZE, YARN_ROPE

MAX_MODEL_LEN = 256  # within phi3's short LongRoPE set, as transformers uses it for sequences of this length
TOLERANCE = 1e-4  # of the largest |logit|
CHUNKS = [1, 60, 7, 16, 1, 1, 94]

Tiny = Callable[..., Path]


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def transformers_logits(directory: Path, sequences: list[list[int]], dtype: torch.dtype = torch.float32) -> Any:
    """`[sequences, tokens, vocabulary]` float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        return model.eval()(torch.tensor(sequences), use_cache=False).logits.float().numpy()


def paged(directory: Path, ops: Ops, block_size: int = 16, dtype: str = "float32") -> PagedModel:
    model = load_model(directory, ops, dtype, MAX_MODEL_LEN)
    return PagedModel(model, ops, num_blocks=2 * MAX_MODEL_LEN // block_size, block_size=block_size)


def assert_close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.fixture(scope="module")
def ops() -> Ops:
    """What serves on the CPU. The reference is compared in a short case of its own."""
    return CpuOps(1, instruction_sets()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_of_the_operations_gives_the_logits_of_transformers(family: str, tiny: Tiny) -> None:
    prompt = tokens(50)
    ours = paged(tiny(family), ReferenceOps(np)).all_logits(prompt, [29, 1, 20])
    assert_close(ours, transformers_logits(tiny(family), [prompt])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str, ops: Ops, tiny: Tiny) -> None:
    directory = tiny(family)
    prompt = tokens(sum(CHUNKS))
    theirs = transformers_logits(directory, [prompt])[0]
    whole = paged(directory, ops).all_logits(prompt, [len(prompt)])
    assert_close(whole, theirs)
    assert_close(paged(directory, ops, block_size=8).all_logits(prompt, CHUNKS), theirs)

    # The greedy continuation is transformers' if each of its tokens is transformers' choice after those before it.
    sequences = paged(directory, ops).greedy([prompt[:40], prompt[60:63]], 200)
    for sequence in sequences:
        choices = transformers_logits(directory, [sequence[:-1]])[0].argmax(-1)
        assert sequence[-200:] == choices[-200:].tolist()
    assert len(set(sequences[0][-200:])) > 3  # a model that repeats itself would prove little


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
        ("llama", YARN_ROPE | {"max_position_embeddings": 1024}),
        ("llama", LLAMA3_ROPE | {"max_position_embeddings": 1024}),
        ("phi3", {"sliding_window": None}),  # longer than the short set reaches: transformers takes the long one
    ],
    ids=["linear", "yarn", "llama3", "longrope"],
)
def test_rotary_positions_stay_exact_far_into_the_sequence(
    family: str, settings: dict[str, Any], ops: Ops, tiny: Tiny
) -> None:
    directory = tiny(family, num_hidden_layers=1, **settings)
    prompt = tokens(512)
    model = PagedModel(load_model(directory, ops, "float32"), ops, num_blocks=32, block_size=16)
    assert_close(model.all_logits(prompt, [512]), transformers_logits(directory, [prompt])[0])


def test_greedy_tokens_are_those_of_capped_logits(ops: Ops, tiny: Tiny) -> None:
    """Logits that a soft cap makes equal are a tie, which the lowest token wins: the cap is not only for samples."""
    model = load_model(tiny("gemma2"), ops, "float32", MAX_MODEL_LEN)
    hidden = np.random.default_rng(3).standard_normal((50, 64), dtype=np.float32) * 1e4
    logits = ops.to_numpy(model.logits(hidden))
    assert np.abs(logits).max() == 1.5 and ((logits == 1.5).sum(axis=1) > 1).all()
    tokens, finite = model.greedy(hidden)
    assert np.array_equal(tokens, logits.argmax(axis=1)) and finite.all()


SETTINGS_THAT_MATTER = [
    ("llama-3.1", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ("llama-bias", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    ("qwen2", {"layer_types": None, "max_window_layers": 2}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ("phi3", {"sliding_window": 24}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 32}),
    ("gemma2", {"sliding_window": 21}),
    ("gemma3", {"sliding_window_pattern": 2, "layer_types": None}),
    ("gemma3", {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 5e3}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 0.25}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 4}),
    ("smollm3", {"use_sliding_window": False, "layer_types": None}),
    ("starcoder2", {"sliding_window": None}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt2", {"activation_function": "relu"}),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS_THAT_MATTER)
def test_the_parity_test_would_notice_a_setting_read_wrongly(
    family: str, settings: dict[str, Any], ops: Ops, tiny: Tiny, tmp_path: Path
) -> None:
    right = tiny(family)
    for file in right.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((right / "config.json").read_text()) | settings
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = tokens(60)
    expected, changed = (paged(path, ops).all_logits(prompt, [60]) for path in (right, tmp_path))
    assert np.abs(changed - expected).max() > 20 * TOLERANCE * np.abs(expected).max()


def mean_kl(reference: Any, other: Any) -> float:
    """KL divergence of next-token distributions, mean over positions."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama-3.1", "bfloat16"), ("gemma2", "bfloat16"), ("qwen2", "bfloat16"), ("gpt2", "float16")],
)
def test_16_bit_storage_is_no_further_from_the_model_than_transformers_is(
    family: str, dtype: str, ops: Ops, tiny: Tiny
) -> None:
    directory = tiny(family, dtype=dtype)
    prompt = tokens(120)
    model = load_model(directory, ops)
    assert model.cache_shape(1, 16).dtype == dtype
    exact = transformers_logits(directory, [prompt])[0]
    theirs = transformers_logits(directory, [prompt], getattr(torch, dtype))[0]
    ours = PagedModel(model, ops, num_blocks=8, block_size=16).all_logits(prompt, [120])
    assert 0 < mean_kl(exact, ours) <= 1.5 * mean_kl(exact, theirs)


def test_shards_load_as_one_file(ops: Ops, tiny: Tiny) -> None:
    one, many = tiny("llama"), tiny("llama", max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    prompt = tokens(40)
    logits = [paged(directory, ops).all_logits(prompt, [40]) for directory in (one, many)]
    assert np.array_equal(*logits)
