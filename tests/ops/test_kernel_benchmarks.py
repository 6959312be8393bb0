"""`benchmarks/kernels.py`: what it prints, what it refuses, what is drawn of it; and the probes of the limits."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from quire.bench.roofline import Roofline
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measure(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHMARKS / "kernels.py"), *flags], capture_output=True, text=True)


def draw(report: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "plot_kernels.py")]
    return subprocess.run(command, input=report, capture_output=True, text=True)


def test_one_operation_as_json_and_as_a_drawing() -> None:
    done = measure(*"--only gated_linear bfloat16 int4 m135 --rows 1 16 --threads 1 --json".split())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {(one["operation"], one["model"], one["shape"]) for one in report["rates"]} == {
        ("gated_linear", "m135", "3072x576")
    }
    assert {(one["format"], one["rows"]) for one in report["rates"]} == {
        (name, rows) for name in ("bfloat16", "int4") for rows in (1, 16)
    }
    for one in report["rates"]:
        assert one["seconds"] > 0 and 0 < one["of_limit"] < 50
        assert one["operations_per_s"] * one["seconds"] == pytest.approx(2 * one["rows"] * 3072 * 576)
    assert report["limits"]["read_bytes_per_s"] > 1e8
    lines = ElementTree.fromstring(draw(done.stdout).stdout).findall(".//{*}polyline")
    assert len(lines) == 4  # two formats, each with its limit
    for line in lines:
        (left, _), (right, _) = (map(float, point.split(",")) for point in line.attrib["points"].split())
        assert left < right


def test_nothing_to_draw_is_said() -> None:
    done = draw('{"rates": []}')
    assert done.returncode == 1 and done.stderr == "gated_linear was not measured\n"


def test_time_runs_out() -> None:
    done = measure("--only", "sample", "--seconds", "0.01", "--threads", "1")
    assert done.returncode == 0
    assert "sample" in done.stdout and "not all was measured" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--only", "smaple"], ["--rows", "0"], ["--seconds", "nan"], ["--only", "sample", "int4"], ["--threads", "0"]],
)
def test_refusals(flags: list[str]) -> None:
    done = measure(*flags)
    assert done.returncode != 0 and done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("isa", instruction_sets())
def test_probes_do_what_they_count(isa: str) -> None:
    ops = CpuOps(2, isa)
    assert ops.probe("read", np.ones(5_000_001, np.uint8)) == 5_000_001
    assert ops.probe("float32", np.empty(0, np.uint8)) > 0
    nothing = np.empty(0, np.uint8)
    assert (ops.probe("int8", nothing) > 0) == (isa in ("avx512_vnni", "avx512_bf16", "amx"))
    assert (ops.probe("bfloat16", nothing) > 0) == (isa in ("avx512_bf16", "amx"))
    assert ops.probe("int8_four_tiles", nothing) == (ops.probe("int8", nothing) if isa == "amx" else 0)
    assert ops.probe("bfloat16_four_tiles", nothing) == (ops.probe("bfloat16", nothing) if isa == "amx" else 0)
    with pytest.raises(ValueError, match="no such kind"):
        ops.probe("int3", np.empty(0, np.uint8))


def test_the_binding_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = runpy.run_path(str(BENCHMARKS / "kernels.py"))
    limits = Roofline(10e9, {"bfloat16": 1e12})

    def found(num_bytes: int, num_operations: int, unit: str | None) -> Any:
        nothing: Callable[[int], object] = lambda _: None  # noqa: E731
        case = script["Case"]("linear", "bfloat16", "m135", "1x1", 1, num_bytes, num_operations, unit, nothing)
        return script["rate"](case, 1.0, limits)

    assert (found(5 * 10**9, 10**11, "bfloat16").bound, found(5 * 10**9, 10**11, "bfloat16").of_limit) == (
        "memory",
        0.5,
    )
    assert (found(10**9, 4 * 10**11, "bfloat16").bound, found(10**9, 4 * 10**11, "bfloat16").of_limit) == (
        "bfloat16",
        0.4,
    )
    assert found(10**9, 4 * 10**11, None).bound == "memory"
