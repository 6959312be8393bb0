"""safetensors files: what the library writes is read bit for bit, what is hostile is refused quickly and cheaply."""

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, Parameter
from quire.weights.formats.safetensors import INDEX, SINGLE, CheckpointWeights
from quire.weights.formats.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from quire.weights.load import check_tensors
from quire.weights.source import TensorInfo

MAX_PEAK_BYTES = 60 * 2**20  # a case's own bytes, up to 9 MB, are a part of it


def entry(shape: Any = (2, 3), start: Any = 0, end: Any = 24, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def pack(header: Any, data: bytes = b"\0" * 24, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "header length 2^63": pack({}, size=2**63),
    "header length 2^64 - 1": pack({}, size=2**64 - 1),
    "header length just past the file": pack({"a": entry()}, size=400),
    "header not JSON": pack(b"{'a': 1}"),
    "header not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "header a list": pack([1, 2]),
    "header cut": pack(b'{"a": {"dtype": "F32"', b""),
    "header NaN": pack(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}'),
    "deep lists": pack(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": pack(b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
    "a million lists": pack(b'{"a": [' + b"[]," * 1_000_000 + b"[]]}"),
    "a million small objects": pack(b'{"a": [' + b'{"b":1},' * 1_000_000 + b"[]]}"),
    "a huge number": pack(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 24]}}'),
    "duplicate tensor": pack(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)),
    "duplicate field": pack(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [6], "data_offsets": [0, 24]}}'),
    "overlap": pack({"a": entry([6]), "b": entry([6], 20, 44)}, b"\0" * 44),
    "same bytes twice": pack({"a": entry(), "b": entry()}),
    "hole at the start": pack({"a": entry([5], 4, 24)}),
    "hole between": pack({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}),
    "hole at the end": pack({"a": entry([5], 0, 20)}),
    "truncated data": pack({"a": entry()}, b"\0" * 23),
    "no data": pack({"a": entry()}, b""),
    "extra data": pack({"a": entry()}, b"\0" * 25),
    "shape product 2^64": pack({"a": entry([2**32, 2**32])}),
    "shape product 2^64 + 6": pack({"a": entry([2**32, 2**32, 0, 6], 0, 24)}),
    "shape product wraps to the span": pack({"a": entry([2**62, 6, 4], 0, 24)}),
    "dimension past 2^63": pack({"a": entry([2**64, 0], 0, 0)}, b""),
    "negative dimension": pack({"a": entry([-2, -3])}),
    "negative offset": pack({"a": entry([6], -24, 0)}),
    "offsets reversed": pack({"a": entry([6], 24, 0)}),
    "offset past 2^63": pack({"a": entry([6], 2**64, 2**64 + 24)}),
    "float dimension": pack({"a": entry([2.0, 3.0])}),
    "boolean dimension": pack({"a": entry([True, 6])}),
    "string dimension": pack({"a": entry(["2", "3"])}),
    "shape is a number": pack({"a": entry(6)}),
    "shape is null": pack({"a": entry(None)}),
    "a thousand dimensions": pack({"a": entry([1] * 1000 + [6])}),
    "one offset": pack({"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}}),
    "unknown dtype": pack({"a": entry(dtype="F13")}),
    "dtype a list": pack({"a": entry(dtype=["F32"])}),
    "no dtype": pack({"a": {"shape": [6], "data_offsets": [0, 24]}}),
    "another field": pack({"a": entry() | {"pickle": "x"}}),
    "half a byte": pack({"a": entry([3], 0, 1, "F4")}, b"\0"),
    "entry null": pack({"a": None}),
    "name with escapes": pack({"\x1b[2J\n/etc/passwd" * 100: entry(dtype="F13")}),
}


def refuse(data: bytes, path: Path) -> ModelFileError:
    """Reading `data` must end in the one error, which names the file, and allocate little on the way."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught, SafetensorsFile(path) as file:
            for tensor in file.tensors:
                file.read(tensor)
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ") and str(path.parent) not in message
    assert message.isprintable() and len(message) < 400
    return caught.value


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    refuse(HOSTILE[case], tmp_path / "hostile.safetensors")


def test_a_sparse_file_with_a_huge_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    for header_size in (MAX_HEADER_BYTES + 1, 100 * 2**20 + 1, 2**33):
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", header_size))
            file.truncate(2**34)
        tracemalloc.start()
        with pytest.raises(ModelFileError, match="header"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("pipe", "device", "folder", "loop", "missing"):
        with pytest.raises(ModelFileError, match=rf"^{name}\.safetensors: "):
            SafetensorsFile(tmp_path / f"{name}.safetensors")


def mutate(rng: random.Random, tensors: dict[str, Any], data: bytes) -> bytes:
    """One file near a valid one: a field of the header replaced, or bytes of the file changed."""
    numbers = [0, 1, -1, 7, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, True, None, "1", [], {}]
    header = json.loads(json.dumps(tensors))
    kind = rng.randrange(6)
    if kind <= 2:
        victim = header[rng.choice(list(header))]
        name = rng.choice(["dtype", "shape", "data_offsets"])
        if kind == 0 or name == "dtype":
            victim[name] = rng.choice([*numbers, "F32", "BF16", "I8", "F4", [2, 2], [1] * 9])
        elif victim[name]:
            victim[name][rng.randrange(len(victim[name]))] = rng.choice(numbers)
    elif kind == 3:
        header[rng.choice("abcd")] = entry([rng.randrange(9)], rng.randrange(60), rng.randrange(99))
    whole = bytearray(pack(header, data))
    if kind >= 4:
        for _ in range(rng.randrange(1, 6)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
    if rng.random() < 0.3:
        del whole[rng.randrange(len(whole)) :]
    return bytes(whole)


def test_mutants_are_read_as_the_format_says_or_refused(tmp_path: Path) -> None:
    """What is read must be consistent: each tensor has its own bytes, and all bytes belong to one tensor."""
    rng = random.Random(20)
    tensors = {"a": entry(), "b": entry([4], 24, 32, "BF16"), "c": entry([0], 32, 32), "d": entry([], 32, 36)}
    path, data = tmp_path / "mutant.safetensors", bytes(range(36))
    refused = 0
    for _ in range(600):
        whole = mutate(rng, tensors, data)
        path.write_bytes(whole)
        try:
            with SafetensorsFile(path) as file:
                total = sum(info.end - info.start for info in file.tensors.values())
                arrays = [file.read(name) for name in file.tensors]
        except ModelFileError as error:
            refused += 1
            assert str(error).startswith("mutant.safetensors: ")
            continue
        assert sum(array.nbytes for array in arrays) == total
        assert total == len(whole) - 8 - int.from_bytes(whole[:8], "little")
    assert 200 < refused < 590


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_the_library_writes_is_read_bit_for_bit(dtype: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"odd": rng.standard_normal((3, 5)).astype(dtype), "one": rng.standard_normal(7).astype(dtype)}
    arrays |= {"empty": np.zeros((0, 4), dtype), "scalar": np.array(1.5, dtype)}
    save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    with CheckpointWeights(tmp_path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: array.shape for name, array in arrays.items()
        }
        for name, array in arrays.items():
            read = checkpoint.read(Concatenated(((name, array.shape),)))
            assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


def test_tensors_are_joined_along_outputs_whatever_their_types(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.float16).reshape(1, 3)
    conv = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a": a, "b": b, "c": a + 1, "conv": conv}, tmp_path / SINGLE)
    with CheckpointWeights(tmp_path) as checkpoint:
        mixed = checkpoint.read(Concatenated((("a", (2, 3)), ("b", (1, 3)))))
        assert mixed.dtype == np.float32 and np.array_equal(mixed, np.concatenate([a, b]))
        same = checkpoint.read(Concatenated((("a", (2, 3)), ("c", (2, 3)))))
        assert np.array_equal(same, np.concatenate([a, a + 1]))
        turned = checkpoint.read(Concatenated((("conv", (3, 4)),), transposed=True))
        assert turned.flags.c_contiguous and np.array_equal(turned, conv.T)


def sharded(directory: Path, weight_map: Any) -> Path:
    save_file({"a": np.zeros(3, np.float32)}, directory / "one.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, directory / "two.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_sound_index_is_read(tmp_path: Path) -> None:
    with CheckpointWeights(sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (3,), "b": (3,)}


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../one.safetensors"},
        {"a": "/etc/one.safetensors"},
        {"a": "sub/one.safetensors"},
        {"a": ".."},
        {"a": "one.bin"},
        {"a": 1},
        {"a": "three.safetensors"},
        {"a": "nul\0.safetensors"},
        {"a": "two.safetensors"},
        {"c": "one.safetensors"},
        {},
        [],
        None,
        "one.safetensors",
        {str(i): f"{i}.safetensors" for i in range(2000)},
    ],
    ids=lambda weight_map: str(weight_map)[:30],
)
def test_an_index_that_points_elsewhere_is_refused(weight_map: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        CheckpointWeights(sharded(tmp_path, weight_map))
    assert ".safetensors" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/inside.safetensors", "{outside}", "sub/../one.safetensors"]
)
def test_an_index_may_not_point_elsewhere_even_where_a_file_is(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    outside = tmp_path / "outside.safetensors"
    for path in (outside, directory / "sub" / "inside.safetensors"):
        save_file({"a": np.zeros(3, np.float32)}, path)
    name = name.format(outside=outside)
    assert (directory / name).is_file() or name.startswith("sub/..")
    with pytest.raises(ModelFileError, match="is not the name of a safetensors file beside it"):
        CheckpointWeights(sharded(directory, {"a": name}))


def test_an_index_that_swaps_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"index\.json: a is not in two\.safetensors"):
        CheckpointWeights(sharded(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"}))


def test_an_index_of_too_many_files_is_refused_before_any_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="more than 1000 files"):
        CheckpointWeights(sharded(tmp_path, {str(i): f"{i}.safetensors" for i in range(1001)}))


def test_a_number_of_bits_that_is_no_number_of_bytes_is_refused_with_the_header(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(pack({"a": entry([3], 0, 1, "F4")}, b"\0"))
    with pytest.raises(ModelFileError, match=r"offsets span 1 bytes, its shape 1$"):
        SafetensorsFile(path)


@pytest.mark.parametrize("kept", [0, 1, 20_000])
def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(kept: int, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": np.arange(2**13, dtype=np.float32)}, path)  # more than a file object reads ahead
    with CheckpointWeights(tmp_path) as checkpoint:
        os.truncate(path, checkpoint.files[0].tensors["a"].start + kept)
        with pytest.raises(ModelFileError, match=r"^model\.safetensors: truncated while a was read$"):
            checkpoint.read(Concatenated((("a", (2**13,)),)))


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelFileError, match=r"two\.safetensors: a is in one\.safetensors too"):
        CheckpointWeights(tmp_path)


def test_a_link_to_a_regular_file_is_read_as_the_hub_cache_needs(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "blob")
    (tmp_path / SINGLE).symlink_to(tmp_path / "blob")
    with CheckpointWeights(tmp_path) as checkpoint:
        assert checkpoint.read(Concatenated((("a", (3,)),))).tolist() == [1, 1, 1]


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelFileError, match="only safetensors"):
        CheckpointWeights(tmp_path)


def test_a_type_that_weights_cannot_have_is_named(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.int64)}, tmp_path / SINGLE)
    with CheckpointWeights(tmp_path) as checkpoint, pytest.raises(ModelFileError, match="a is I64"):
        checkpoint.read(Concatenated((("a", (3,)),)))


def test_check_tensors_names_what_is_wrong() -> None:
    parameters = {"x": Parameter("linear", Concatenated((("a", (2, 3)),)), Concatenated((("b", (3,)),)))}

    def stated(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}

    check_tensors(parameters, stated({"a": (2, 3), "b": (3,), "c.inv_freq": (4,)}), ("*.inv_freq",))
    wrong: list[tuple[dict[str, tuple[int, ...]], str]] = [
        ({"a": (2, 3)}, "lacks b"),
        ({"a": (3, 2), "b": (3,)}, r"a has the shape \[3, 2\]; the config asks for \[2, 3\]"),
        ({"a": (2, 3), "b": (3,), "c": (1,)}, "does not: c"),
    ]
    for shapes, message in wrong:
        with pytest.raises(ModelFileError, match=message):
            check_tensors(parameters, stated(shapes), ("*.inv_freq",))
