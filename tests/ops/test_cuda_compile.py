"""Every kernel becomes machine code for GPUs that are not here: what Triton's interpreter lets pass, ptxas does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
MATRIX = {
    "linear_kernel": {80: {"HMMA"}, 90: {"HGMMA", "QGMMA"}},
    "attention_kernel": {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}},
}


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """In a process of its own, where kernels are not interpreted. GEMMs use each generation's own tensor cores."""
    command = [sys.executable, "-W", "ignore", "benchmarks/cuda_compile.py", "--model", "m1b", "--quick", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "src"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for kernel, by_arch in MATRIX.items():
        for arch, units in by_arch.items():
            lines = [one["matrix_instructions"] for one in found if (one["kernel"], one["arch"]) == (kernel, arch)]
            assert {word.split(".")[0] for line in lines for word in line.split()} == units, (kernel, arch)
    units = [
        one["matrix_instructions"].split(".")[1]
        for one in found
        if (one["kernel"], one["arch"]) == ("linear_kernel", 90) and one["shape"].startswith("plain")
    ]
    # 64 outputs, as many rows as the tile has, 16 inputs at a time: a row's chain of sums is the same in all of them.
    assert sorted(units) == ["64x128x16", "64x16x16", "64x64x16"]
    kernels = {one["kernel"] for one in found}
    modules = (ROOT / "src/quire/ops/cuda").glob("*.py")
    written = {
        line.split("(")[0].removeprefix("def ")
        for module in modules
        for line in module.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert written and written <= kernels
