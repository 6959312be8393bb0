"""Configuration: refusals name the argument; sizes are resolved with their reasons."""

from dataclasses import replace
from typing import Any

import pytest

from quire.config import EngineArgs, MemoryBudget, ModelSizes, resolve_batched_tokens, resolve_cache
from quire.errors import ConfigurationError

SIZES = ModelSizes(
    max_position_embeddings=1024,
    bytes_per_block=2**10,
    device="cpu",
    memory=MemoryBudget(device=2**30, weights=2**20),
    free=2**31,
)
MIB = 2**20
DEVICE = replace(
    SIZES,
    device="cuda",
    free=None,
    memory=MemoryBudget(
        device=1000 * MIB, used_by_others=50 * MIB, weights=300 * MIB, activations=100 * MIB, sampler=20 * MIB,
        graphs=30 * MIB, fragmentation_reserve=10 * MIB,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int3"), ("block_size", 17), ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", float("nan")), ("max_num_seqs", 0), ("max_num_seqs", None), ("max_model_len", 1.5),
        ("threads", 0), ("scheduling_policy", "lifo"), ("device", "tpu"), ("seed", -1), ("model", ""),
        ("tensor_parallel_size", 2), ("quantization", "awq"), ("quantization", "int4 "), ("quantization", True),
        ("quantization_group_size", 48), ("quantization_group_size", True), ("quantization_group_size", "64"),
        ("enable_prefix_caching", 1), ("verify_cached_blocks", "yes"), ("kv_cache_memory_bytes", -5),
        ("release_idle_memory", "some"), ("logprobs_mode", "raw"), ("logprobs_mode", "processed_logprobs"),
        ("logprobs_mode", "processed_logits"), ("logprobs_mode", None), ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", "int4"), ("kv_cache_dtype", None), ("kv_cache_dtype", 8),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EngineArgs.from_mapping({name: value})
    assert caught.value.field == name


def test_without_a_prefix_cache_there_are_no_cached_blocks_to_verify() -> None:
    with pytest.raises(ConfigurationError, match="verify_cached_blocks needs enable_prefix_caching"):
        EngineArgs(verify_cached_blocks=True, enable_prefix_caching=False)


def test_unknown_arguments_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'max_model_len'"):
        EngineArgs.from_mapping({"max_model_length": 5})


def test_cpu_cache_is_no_larger_than_its_users_need() -> None:
    plan = resolve_cache(EngineArgs(max_num_seqs=4), SIZES)
    assert plan.num_blocks == 4 * 1024 // 16
    assert plan.max_model_len == 1024
    assert any("max_num_seqs=4" in decision.reason for decision in plan.decisions)


def test_a_host_gives_the_cache_no_more_than_half_of_what_is_free() -> None:
    """But one sequence of a length that was asked for; the words say that it is not taken yet."""
    some = replace(SIZES, free=600 * 2**10)
    plan = resolve_cache(EngineArgs(), some)
    assert (plan.num_blocks, plan.max_model_len) == (300, 1024)
    named = {decision.name: decision for decision in plan.decisions}
    assert named["num_blocks"].value == "300 x 16 tokens, reserved up to 0 MiB"
    assert named["num_blocks"].reason == "half of the 1 MiB that are free"
    assert named["memory"].value.startswith("up to ")
    little = replace(SIZES, free=20 * 2**10)
    assert resolve_cache(EngineArgs(), little).max_model_len == 160
    assert resolve_cache(EngineArgs(max_model_len=1000), little).num_blocks == 63
    with pytest.raises(ConfigurationError, match="half of the 0 MiB that are free"):
        resolve_cache(EngineArgs(), replace(SIZES, free=100))


@pytest.mark.parametrize(
    ("arguments", "weights", "limit"),
    [
        ({}, 100 * 2**10, 100),
        ({}, 2**10, 64),
        ({"max_num_seqs": 2}, 2**20, 128),
        ({"kv_cache_memory_bytes": 900 * 2**10}, 100 * 2**10, 900),
        ({"num_gpu_blocks_override": 500}, 100 * 2**10, 500),
    ],
)
def test_the_prefix_cache_takes_about_as_much_as_the_weights(arguments: Any, weights: int, limit: int) -> None:
    """Or one longest sequence, if that is more; all of it where a size was given."""
    facts = replace(SIZES, memory=replace(SIZES.memory, weights=weights))
    plan = resolve_cache(EngineArgs(**arguments), facts)
    assert plan.soft_block_limit == limit <= plan.num_blocks
    on_device = resolve_cache(EngineArgs(), DEVICE)
    assert on_device.soft_block_limit == on_device.num_blocks


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33), ("8Gi", 2**33), ("8G", 2**33), ("8g", 8 * 10**9), ("8GB", 8 * 10**9), ("512MiB", 2**29),
        ("512 MiB", 2**29), ("0.5G", 2**29), ("1.5KiB", 1536), ("1500", 1500), ("2T", 2**41), ("3kB", 3000),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert EngineArgs.from_mapping({"kv_cache_memory_bytes": text}).kv_cache_memory_bytes == size


@pytest.mark.parametrize("text", ["", "8GB/s", "GiB", "1.0001K", "8 gib", "-1G", "1e9", "0", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_memory_bytes"):
        EngineArgs.from_mapping({"kv_cache_memory_bytes": text})


def test_memory_share_bounds_weights_and_cache() -> None:
    args = EngineArgs(max_num_seqs=4096, gpu_memory_utilization=0.01)
    plan = resolve_cache(args, SIZES)
    assert 0 <= int(0.01 * SIZES.memory.device) - plan.memory.used < SIZES.bytes_per_block
    assert plan.memory.cache == plan.num_blocks * SIZES.bytes_per_block


def test_on_a_device_the_cache_gets_what_the_other_lines_leave() -> None:
    plan = resolve_cache(EngineArgs(gpu_memory_utilization=0.9), DEVICE)
    assert (plan.memory.cache, plan.memory.used) == (390 * MIB, 900 * MIB)
    assert str(plan.memory) == (
        "used_by_others 50 MiB, weights 300 MiB, activations 100 MiB, sampler 20 MiB, "
        "graphs 30 MiB, fragmentation_reserve 10 MiB, cache 390 MiB: 900 MiB of 1,000 MiB"
    )
    assert plan.decisions[-1].reason == str(plan.memory)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_cache_memory_bytes": 491 * MIB}, "kv_cache_memory_bytes does not fit the device: used_by_others 50 MiB"),
        ({"num_gpu_blocks_override": 491 * 1024}, "num_gpu_blocks_override does not fit the device"),
        (
            {"gpu_memory_utilization": 0.5},
            "0.5 of 1,000 MiB is 500 MiB; without any cache there is used_by_others 50 MiB",
        ),
        ({"gpu_memory_utilization": 0.511, "max_model_len": 1024 * 1024}, "positions"),
    ],
)
def test_what_a_device_cannot_hold_is_refused_with_the_budget(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        resolve_cache(EngineArgs(**arguments), DEVICE)


def test_explicit_sizes() -> None:
    assert resolve_cache(EngineArgs(num_gpu_blocks_override=64), SIZES).num_blocks == 64
    assert resolve_cache(EngineArgs(kv_cache_memory_bytes=2**17 + 5), SIZES).num_blocks == 128
    shortened = resolve_cache(EngineArgs(num_gpu_blocks_override=10), SIZES)
    assert shortened.max_model_len == 160


def test_blocks_that_just_hold_one_sequence_are_enough() -> None:
    plan = resolve_cache(EngineArgs(max_model_len=1024, num_gpu_blocks_override=64), SIZES)
    assert (plan.max_model_len, plan.num_blocks) == (1024, 64)
    assert not any(decision.name == "max_model_len" for decision in plan.decisions)


def test_a_device_may_be_filled_to_the_last_byte() -> None:
    plan = resolve_cache(EngineArgs(kv_cache_memory_bytes=490 * MIB), DEVICE)
    assert plan.memory.used == plan.memory.device


def test_the_last_block_of_a_sequence_may_be_part_full() -> None:
    plan = resolve_cache(EngineArgs(max_num_seqs=3, max_model_len=1000), SIZES)
    assert plan.num_blocks == 3 * 63


@pytest.mark.parametrize(("rows", "asked", "budget"), [(256, None, 2048), (4096, None, 4096), (4096, 100, 100)])
def test_a_step_has_room_for_one_token_of_each_row(rows: int, asked: int | None, budget: int) -> None:
    args = EngineArgs(max_num_seqs=rows, max_num_batched_tokens=asked, num_gpu_blocks_override=64)
    assert resolve_batched_tokens(args) == resolve_cache(args, SIZES).max_num_batched_tokens == budget


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("seed", 0, 2**63 - 1), ("max_num_queued_reqs", 0, 2**62), ("max_num_queued_tokens", 1, 2**62),
        ("max_num_seqs", 1, 4096), ("max_num_batched_tokens", 1, 2**20), ("threads", 1, 1024),
        ("max_model_len", 1, 2**24), ("hang_timeout", 0.1, 86400),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(name: str, smallest: float, largest: float) -> None:
    for value in (smallest, largest):
        assert getattr(EngineArgs.from_mapping({name: value}), name) == value
    for value in (smallest - (1 if smallest in (0, 1) else 0.01), largest + 1):
        with pytest.raises(ConfigurationError) as caught:
            EngineArgs.from_mapping({name: value})
        assert caught.value.field == name


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_queued_reqs", "tensor_parallel_size", "core_process"])
def test_null_is_no_value_where_nothing_is_decided(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EngineArgs.from_mapping({name: None})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_model_len": 2048}, "1024 positions"),
        ({"max_model_len": 1024, "num_gpu_blocks_override": 63}, "max_model_len"),
        ({"gpu_memory_utilization": 0.0005}, "without any cache there is weights 1 MiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        resolve_cache(EngineArgs(**arguments), SIZES)
