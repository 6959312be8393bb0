"""How several models share a machine: memory, free memory and cores."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quire.compose.core import compose_core
from quire.compose.machine_split import cores_part, free_part, memory_part, on_own_cores, shares_of
from quire.compose.weight_size import weight_bytes
from quire.config import EngineArgs, ModelShare
from quire.errors import ConfigurationError
from quire.runner.host_memory import host_memory_bytes
from tests.tiny.checkpoints import make_tiny

GIB = 2**30
BYTES_PER_BLOCK = 16 * 3 * 2 * 2 * 16 * 2
"""Tokens, layers, keys and values, heads, numbers of a head, bytes: of the tiny model."""


def share(place: int = 0, **changes: Any) -> ModelShare:
    values: dict[str, Any] = {
        "needs": (2 * GIB, 6 * GIB), "stated": (None, None), "total": 0.9, "free_bytes": 20 * GIB,
        "threads": (None, None),
    }  # fmt: skip
    return ModelShare(place, **{**values, **changes})


def test_what_is_spare_is_divided_evenly_once_all_weights_are_in() -> None:
    parts = [memory_part(share(place), 20 * GIB) * 20 for place in (0, 1)]
    assert parts == pytest.approx([2 + 5, 6 + 5]), "18 GiB, of which 10 are spare"
    assert [free_part(share(place)) for place in (0, 1)] == [6 * GIB, 6 * GIB], "of 20 - 8 that are free"
    assert free_part(share(free_bytes=GIB)) == 0


def test_a_stated_share_is_taken_as_it_is_and_the_others_have_the_rest() -> None:
    stated = (0.25, None, None)
    needs = (2 * GIB, GIB, 3 * GIB)
    parts = [memory_part(share(place, needs=needs, stated=stated), 20 * GIB) * 20 for place in range(3)]
    assert parts == pytest.approx([5, 1 + 4.5, 3 + 4.5]), "13 GiB are left, of which 9 are spare"


@given(
    needs=st.lists(st.integers(0, GIB), min_size=1, max_size=6),
    stated=st.lists(st.none() | st.floats(0.01, 0.1), min_size=6, max_size=6),
    total=st.floats(0.7, 1.0),
)
def test_all_shares_together_are_no_more_than_the_whole(
    needs: list[int], stated: list[float | None], total: float
) -> None:
    given_shares = tuple(stated[: len(needs)])
    one = {"needs": tuple(needs), "stated": given_shares, "total": total}
    parts = [memory_part(share(place, **one), 64 * GIB) for place in range(len(needs))]
    if None in given_shares:
        assert sum(parts) == pytest.approx(total)
    for part, need, own in zip(parts, needs, given_shares, strict=True):
        assert part == own if own is not None else part * 64 * GIB >= need


@pytest.mark.parametrize(
    ("num_cores", "asked", "total", "expected"),
    [
        (8, (None, None), None, [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]),
        (8, (None, None, None), None, [(3, [0, 1, 2]), (3, [3, 4, 5]), (2, [6, 7])]),
        (8, (5, None), None, [(5, [0, 1, 2, 3, 4]), (3, [5, 6, 7])]),
        (8, (None, None), 4, [(2, [0, 1]), (2, [2, 3])]),
        (2, (None, None, None), None, [(1, []), (1, []), (1, [])]),
        (2, (2, 2), None, [(2, []), (2, [])]),
    ],
    ids=["evenly", "remainder", "asked", "total", "too-few", "more-than-there-are"],
)
def test_cores(num_cores: int, asked: Any, total: int | None, expected: list[tuple[int, list[int]]]) -> None:
    cores = [[core] for core in range(num_cores)]
    places = range(len(asked))
    found = [
        cores_part(share(place, needs=(0,) * len(asked), threads=asked, total_threads=total), cores) for place in places
    ]
    assert found == expected
    assert cores_part(share(1), [[0, 4], [1, 5]]) == (1, [1, 5]), "both processors of a core"


def test_a_core_keeps_to_its_own_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    for module in ("quire.ops.select", "quire.compose.machine_split"):
        monkeypatch.setattr(f"{module}.core_processors", lambda: [[0, 4], [1, 5], [2, 6], [3, 7]])
    monkeypatch.setattr("quire.ops.select._cgroup_quota", lambda: None)
    monkeypatch.setattr("os.sched_setaffinity", lambda process, own: kept.append((process, own)))
    args = EngineArgs()
    assert on_own_cores(args, share(1)) == args and kept == [(0, [2, 6, 3, 7])]
    crowded = share(1, threads=(4, None))
    assert on_own_cores(args, crowded).threads == 1 and len(kept) == 1, "there is no core left for it alone"


def test_a_core_sizes_its_cache_by_its_share(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_setaffinity", lambda process, own: None)
    args = EngineArgs(model=str(tiny_model), max_model_len=64, device="cpu")

    def blocks(**changes: Any) -> tuple[int, str, str]:
        own = share(1, needs=(0, 0), **changes)
        found = {one.name: one for one in compose_core(args, tiny_model, share=own).info.decisions}
        return int(found["num_blocks"].value.split()[0]), found["num_blocks"].reason, found["share"].value

    alone, reason, part = blocks()
    assert alone == 4 * 256 and "max_num_seqs" in reason and part == "0.45 of memory"
    little = 2 * 100 * BYTES_PER_BLOCK
    assert blocks(free_bytes=2 * little)[0] == 100, "half of an even part of what is free"
    tight = (0.9, 8 * 2**20 / host_memory_bytes())
    by_share, reason, _ = blocks(stated=tight)
    assert 0 < by_share < alone and "gpu_memory_utilization" in reason


def size_by_its_header(path: Path) -> int:
    """Matrices in 16 bits and vectors in 32, as a packed model has them."""
    with safe_open(path / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 -- it is no mapping
    return sum(math.prod(shape) * (4 if len(shape) == 1 else 2) for shape in shapes)


def test_a_model_needs_what_the_loader_packs_of_its_files(tiny_model: Path, tmp_path: Path) -> None:
    wide = make_tiny("llama", tmp_path / "wide", dtype="float32", tokenizer=True)
    size = size_by_its_header(tiny_model)
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (wide / name).write_bytes(bytes(3 * size))
    found = weight_bytes(EngineArgs(device="cpu", dtype="bfloat16"), wide)
    assert weight_bytes(EngineArgs(device="cpu"), tiny_model) == found == size
    for changes in ({}, {"dtype": "bfloat16"}, {"quantization": "int4"}, {"quantization": "int8"}):
        args = EngineArgs(model=str(wide), max_model_len=64, device="cpu", **changes)  # type: ignore[arg-type]
        assert weight_bytes(args, wide) == compose_core(args, wide).host_weight_bytes, changes


def test_a_model_that_cannot_be_loaded_takes_nothing_from_the_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert weight_bytes(EngineArgs(device="cpu"), tmp_path) == 0


def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"small": 2**20, "large": int(host_memory_bytes() * 0.8)}
    monkeypatch.setattr("quire.compose.machine_split.weight_bytes", lambda args, path: sizes[path.name])

    def shares(stated: list[float | None], total: float = 0.9, **changes: Any) -> list[ModelShare]:
        models = [
            (EngineArgs(model="small", device="cpu"), Path("small")),
            (EngineArgs(model="large", device="cpu", **changes), Path("large")),
        ]
        return shares_of(models, stated, total, None)

    found = shares([None, None])
    assert [one.place for one in found] == [0, 1] and found[0].needs == tuple(sizes.values())
    for stated, total, text in (
        ([0.6, 0.5], 0.9, "is 1.1 together; it may be 1 at most"),
        ([0.9, None], 0.9, "would have nothing of 0.9"),
        ([None, None], 0.5, "gives small 0.00 of"),
        ([None, 0.3], 0.9, "gives large 0.30 of .* MiB; its weights and the cache that it asks for are"),
    ):
        with pytest.raises(ConfigurationError, match=text) as caught:
            shares(stated, total)  # type: ignore[arg-type]
        assert caught.value.field == "gpu_memory_utilization"
    with pytest.raises(ConfigurationError, match="gpu_memory_utilization"):
        shares([None, None], kv_cache_memory_bytes=host_memory_bytes() // 2)
