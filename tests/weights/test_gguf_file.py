"""Headers of GGUF files: what the `gguf` package reads is read alike; what is wrong is named, at once and cheaply."""

import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quire.errors import ModelFileError
from quire.weights.formats.gguf_file import MAX_HEADER_BYTES, GgufArray, GgufFile
from quire.weights.formats.gguf_names import find_gguf, is_gguf, part_names
from quire.weights.formats.gguf_parts import GgufParts
from tests.tiny.gguf_files import add_tensor, close

MUTATIONS = int(os.environ.get("QUIRE_TEST_MUTATIONS", "500"))
"""Of headers; 10,000 take a minute."""


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name: str = "a", dims: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(
    pairs: list[bytes] = [],  # noqa: B006  (never changed)
    tensors: list[bytes] = [],  # noqa: B006
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = b"\0" * 32,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    head += b"".join([*pairs, *tensors])
    return head + b"\0" * (-len(head) % 32) + data


def written(path: Path) -> Path:
    """A header with every type of value, by the package's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 65535), ("int16", -2), ("uint32", 4), ("int32", -9)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_int64("a.int64", -(2**62))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "分頁 👍🏽")
    writer.add_array("a.strings", ["", "a", "▁é"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -0.25])
    writer.add_array("a.flags", [True, False])
    rng = np.random.default_rng(0)
    for name, kind in (("one", "F32"), ("two", "Q4_1"), ("three", "F16"), ("four", "Q8_0")):
        add_tensor(writer, name, rng.standard_normal((6, 64)), kind)
    writer.add_tensor("five", np.ones(7, np.float32))
    return close(writer)


def test_a_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(path)
    with GgufFile(path) as file:
        values = {key: value.items if isinstance(value, GgufArray) else value for key, value in file.values.items()}
        assert values == {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
        assert [*file.tensors] == [theirs.name for theirs in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(size) for size in theirs.shape[::-1])
            assert (ours.format, ours.start) == (theirs.tensor_type.name, theirs.data_offset)
            assert ours.end - ours.start == theirs.n_bytes


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments_are_kept(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    path = close(writer)
    with GgufFile(path) as file:
        starts = [found.start for found in file.tensors.values()]
        assert starts == [theirs.data_offset for theirs in gguf.GGUFReader(path).tensors]
        assert all(start % alignment == 0 for start in starts)


def test_version_2_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw([pair("k", 4, struct.pack("<I", 7))], [tensor()], version=2))
    with GgufFile(path) as file:
        assert file.values == {"k": 7} and file.tensors["a"].shape == (2, 4)


BIG = 2**62
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated: the beginning needs 8 bytes, 0 are left"),
    "other": (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
    "version 1": (raw(version=1), "GGUF version 1; 2 and 3 are read"),
    "version 4": (raw(version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"a big-endian GGUF file \(version 3\)"),
    "many tensors": (raw(counts=(BIG, 0)), r"the number of tensors claims 4,611,.*; at most 65,536"),
    "more tensors than bytes": (raw(counts=(60000, 0)), "truncated: the number of tensors claims 60,000"),
    "many keys": (raw(counts=(0, BIG)), "the number of keys claims"),
    "long key": (raw([struct.pack("<Q", BIG)]), "key 0 claims 4,611,686,018,427,387,904 bytes; at most 65,535"),
    "long string": (raw([pair("k", 8, struct.pack("<Q", BIG))]), "k claims 4,611"),
    "string past the end": (raw([pair("k", 8, struct.pack("<Q", 5000))]), "truncated: k needs 5,000 bytes, "),
    "string not UTF-8": (raw([pair("k", 8, text(b"\xff"))]), "k is not UTF-8"),
    "key twice": (raw([pair("k", 0, b"\1")] * 2), "the key k appears twice"),
    "unknown value": (raw([pair("k", 13, b"\0" * 8)]), "k has the unknown type 13"),
    "no truth value": (raw([pair("k", 7, b"\2")]), "k must be true or false, got 2"),
    "array of arrays": (raw([pair("k", 9, struct.pack("<IQ", 9, 1))]), "k is an array of type 9"),
    "long array": (raw([pair("k", 9, struct.pack("<IQ", 12, 2**40))]), "k claims 1,099,511,627,776"),
    "array past the end": (raw([pair("k", 9, struct.pack("<IQ", 12, 2**20))]), "truncated: k claims 1,048,576"),
    "many strings": (raw([pair("k", 9, struct.pack("<IQ", 8, 2**22))]), "k claims 4,194,304; at most 2,097,152"),
    "strings past the end": (
        raw([pair("k", 9, struct.pack("<IQ", 8, 2) + text("a") + struct.pack("<Q", 999))]),
        "truncated: k needs 999 bytes",
    ),
    "alignment 0": (raw([pair("general.alignment", 4, b"\0" * 4)]), "general.alignment must be a power of two"),
    "alignment 48": (raw([pair("general.alignment", 4, struct.pack("<I", 48))]), r"general\.alignment .*got 48"),
    "alignment text": (raw([pair("general.alignment", 8, text("32"))]), "general.alignment must be"),
    "no dimensions": (raw([], [tensor(dims=())], data=b"\0" * 64), "a has 0 dimensions; 1 to 4"),
    "five dimensions": (raw([], [tensor(dims=(1,) * 5)]), "a has 5 dimensions"),
    "no values": (raw([], [tensor(dims=(4, 0))]), r"a has the shape \[0, 4\]"),
    "overflow": (raw([], [tensor(dims=(2**33, 2**33))]), r"a has the shape \[8589934592, 8589934592\]"),
    "unknown type": (raw([], [tensor(kind=99)]), r"a is of the type 99 \(unknown\); Quire reads F32, F16"),
    "other type": (raw([], [tensor(kind=16)]), r"a is of the type 16 \(IQ2_XXS\)"),
    "broken block": (raw([], [tensor(dims=(33, 2), kind=2)]), "a has rows of 33 values; Q4_0 has blocks of 32"),
    "misaligned": (raw([], [tensor(offset=8)], data=b"\0" * 96), "a begins at 8, which is no multiple of the align"),
    "past the end": (raw([], [tensor(dims=(9, 2))]), r"truncated: a ends at \d+, the file at"),
    "far past the end": (raw([], [tensor(offset=2**60)]), "truncated: a ends at 1,152,921"),
    "overlapping": (
        raw([], [tensor("a", (16, 1)), tensor("b", (4, 2), offset=32)], data=b"\0" * 96),
        "b begins at 32 of the data, a ends at 64",
    ),
    "tensor twice": (raw([], [tensor(), tensor(offset=32)], data=b"\0" * 64), "the tensor a appears twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_header_is_an_error_that_names_file_and_place(name: str, tmp_path: Path) -> None:
    data, match = BAD[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ModelFileError, match=rf"^x\.gguf: .*({match})"):
        GgufFile(tmp_path / "x.gguf")


def test_a_header_cannot_ask_for_memory_that_the_file_does_not_hold(tmp_path: Path) -> None:
    """Nor for more than headers have, of a file that is (sparsely) that large."""
    path = tmp_path / "x.gguf"
    path.write_bytes(raw([pair("k", 9, struct.pack("<IQ", 0, MAX_HEADER_BYTES))], data=b""))
    os.truncate(path, 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError, match=r"k is beyond the 67,108,864 bytes that a header may have"):
        GgufFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_every_truncation_of_a_file_is_an_error(tmp_path: Path) -> None:
    data = written(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    for size in range(0, len(data) - 4, 7):  # the last tensor's padding is not needed
        path.write_bytes(data[:size])
        if size < len(data) - 31:
            with pytest.raises(ModelFileError, match=r"^x\.gguf: "):
                GgufFile(path)


def mutated(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """A few bytes or numbers of the header changed, or a piece taken out or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(4, header_bytes)
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at : at + 8] = rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little")
            case 2:
                changed[at : at + 4] = rng.choice([0, 5, 8, 9, 39, 2**32 - 1]).to_bytes(4, "little")
            case 3:
                del changed[at : at + rng.randrange(1, 64)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(changed)


def test_mutated_headers_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """Refused with the file's name, within a second, without a jump in memory; what is read lies within the file."""
    data, path = written(tmp_path / "whole.gguf").read_bytes(), tmp_path / "x.gguf"
    rng, refused, slowest = random.Random(0), 0, 0.0
    with GgufFile(tmp_path / "whole.gguf") as whole:
        header_bytes = min(found.start for found in whole.tensors.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, header_bytes, rng))
        start = time.perf_counter()
        try:
            with GgufFile(path) as file:
                size = path.stat().st_size
                assert all(0 < found.start < found.end <= size for found in file.tensors.values())
                for value in file.values.values():
                    if isinstance(value, GgufArray):
                        _items_or_error(value)
        except ModelFileError as error:
            assert error.message.startswith("x.gguf: ") and len(error.message) < 600
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert MUTATIONS // 4 < refused < MUTATIONS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    print(f"{refused} of {MUTATIONS} refused; the slowest took {slowest:.3f} s")


def _items_or_error(array: GgufArray) -> None:
    try:
        assert len(array.items) == array.count
    except ModelFileError as error:
        assert "is not UTF-8" in error.message


def split(tmp_path: Path, change: Callable[[int, dict[str, Any]], None] = lambda *_: None) -> Path:
    """A model of three parts as gguf-split writes them; the first is returned."""
    for number in range(3):
        path = tmp_path / f"m-{number + 1:05}-of-00003.gguf"
        stated = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
        change(number, stated)
        pairs = [pair(key, 2, struct.pack("<H", value)) for key, value in stated.items()]
        if number == 0:
            pairs.append(pair("general.architecture", 8, text("llama")))
        path.write_bytes(raw(pairs, [tensor(f"t{number}", (4, 2))], data=bytes([number]) * 32))
    return tmp_path / "m-00001-of-00003.gguf"


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    first = split(tmp_path)
    for path in (first, tmp_path / "m-00003-of-00003.gguf"):
        with GgufParts(path) as parts:
            assert parts.values["general.architecture"] == "llama"
            assert {name: file.name[2:7] for name, file in parts.home.items()} == {
                "t0": "00001", "t1": "00002", "t2": "00003",
            }  # fmt: skip
    assert find_gguf(tmp_path) == first


def test_parts_that_are_missing_or_do_not_belong_together_are_named(tmp_path: Path) -> None:
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"^m-00002-of-00003\.gguf, one of 3 parts of this model, is missing$"):
        GgufParts(first)

    def swapped(number: int, stated: dict[str, Any]) -> None:
        stated["split.no"] = [0, 2, 1][number]

    with pytest.raises(ModelFileError, match=r"^m-00002-of-00003\.gguf: its header says split.count 3 and split.no 2"):
        GgufParts(split(tmp_path, swapped))

    def too_few(_: int, stated: dict[str, Any]) -> None:
        stated["split.tensors.count"] = 4

    with pytest.raises(ModelFileError, match=r"split\.tensors\.count is 4; there are 3"):
        GgufParts(split(tmp_path, too_few))

    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00001-of-00003.gguf").read_bytes())
    with pytest.raises(ModelFileError, match=r"t0 is in m-00001-of-00003\.gguf too"):
        GgufParts(first)
    for name in ("m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-99999.gguf"):
        with pytest.raises(ModelFileError, match="must count from 1"):
            part_names(name)


def test_a_part_alone_under_another_name_says_that_it_is_one(tmp_path: Path) -> None:
    split(tmp_path).rename(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match=r"^m\.gguf: its header says split.count 3"):
        GgufParts(tmp_path / "m.gguf")


def test_files_are_known_by_what_they_begin_with(tmp_path: Path) -> None:
    (tmp_path / "sha256-0a1b").write_bytes(raw())
    (tmp_path / "x.gguf").write_bytes(b"GGU")
    assert is_gguf(tmp_path / "sha256-0a1b") and not is_gguf(tmp_path / "x.gguf")
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "nowhere")
    (tmp_path / "y.gguf").write_bytes(raw())
    with pytest.raises(ModelFileError, match=r"the directory holds 2 GGUF models; name the file: x\.gguf, y\.gguf"):
        find_gguf(tmp_path)
