"""`quire bench kernels`: what it prints, what it refuses, what it draws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from quire.bench.kernels import Case, Limits, rate
from quire.bench.plot import Panel, Series, draw
from quire.cli.main import main
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets


def test_one_operation_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "rates.svg"
    flags = "--only gated_linear bfloat16 int4 m135 --rows 1 16 --threads 1 --json --plot".split()
    code = main(["bench", "kernels", *flags, str(plot)])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {(one["operation"], one["model"], one["shape"]) for one in report["rates"]} == {
        ("gated_linear", "m135", "3072x576")
    }
    assert {(one["format"], one["rows"]) for one in report["rates"]} == {
        (name, rows) for name in ("bfloat16", "int4") for rows in (1, 16)
    }
    for one in report["rates"]:
        assert one["seconds"] > 0 and 0 < one["of_limit"] < 50
        assert one["products_per_s"] * one["seconds"] == pytest.approx(2 * one["rows"] * 3072 * 576)
    assert report["limits"]["read_bytes_per_s"] > 1e8
    root = ElementTree.fromstring(plot.read_text())
    assert len(root.findall(".//{*}polyline")) == 4  # two formats, each with its limit


def test_time_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--only", "rope", "--seconds", "0.01", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "rope" in shown.out and "not all was measured" in shown.err


@pytest.mark.parametrize(
    "flags", [["--only", "rpoe"], ["--rows", "0"], ["--seconds", "nan"], ["--only", "rope", "int4"], ["--threads", "0"]]
)
def test_refusals(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *flags]) != 0
    assert "quire" in capsys.readouterr().err


@pytest.mark.parametrize("isa", instruction_sets())
def test_probes_do_what_they_count(isa: str) -> None:
    ops = CpuOps(2, isa)
    assert ops.probe("read", np.ones(5_000_001, np.uint8)) == 5_000_001
    assert ops.probe("float32", np.empty(0, np.uint8)) > 0
    assert (ops.probe("int8", np.empty(0, np.uint8)) > 0) == (isa == "amx")
    with pytest.raises(ValueError, match="no such kind"):
        ops.probe("int3", np.empty(0, np.uint8))


def test_the_binding_limit_is_named() -> None:
    limits = Limits(10e9, {"bfloat16": 1e12})

    def found(num_bytes: int, num_products: int, unit: str | None) -> Any:
        nothing: Callable[[int], object] = lambda _: None  # noqa: E731
        case = Case("linear", "bfloat16", "m135", "1x1", 1, num_bytes, num_products, unit, nothing)
        return rate(case, 1.0, limits)

    assert (found(5 * 10**9, 10**11, "bfloat16").bound, found(5 * 10**9, 10**11, "bfloat16").of_limit) == (
        "memory",
        0.5,
    )
    assert (found(10**9, 4 * 10**11, "bfloat16").bound, found(10**9, 4 * 10**11, "bfloat16").of_limit) == (
        "bfloat16",
        0.4,
    )
    assert found(10**9, 4 * 10**11, None).bound == "memory"


def test_a_plot_is_a_document_with_its_points_in_order() -> None:
    series = Series("a < b", [(1, 0.01), (16, 0.1), (512, 1.0)], [(1, 0.02), (16, 0.2), (512, 2.0)])
    root = ElementTree.fromstring(draw([Panel("one", [series]), Panel("two", [series])], "rows", "rate"))
    line = root.findall(".//{*}polyline")[1].attrib["points"].split()
    places = [tuple(map(float, point.split(","))) for point in line]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    for points in ([], [(1, 0.0)], [(0, 1.0)]):
        with pytest.raises(ValueError, match="above zero"):
            draw([Panel("one", [Series("a", points, [])])], "rows", "rate")
