"""What a new operation touches: a throw-away one is added to a copy of the tree by the table of `howto/kernel.md`."""

import re
import subprocess
import sys

import pytest

from quire.ops import _native
from quire.ops.graph.program import Instruction
from scripts.house.tree import ROOT
from scripts.mutation.tree_copy import TreeCopy, native_extension

CONTRACT = '''
    def square(self, x: Array) -> Array:
        """`x * x`, element by element."""
'''
DEFINITION = '''
    def square(self, x: Array) -> Array:
        """`x * x`. Exact."""
        return x * x
'''
REGISTRATION = """
@dataclass(frozen=True, slots=True)
class Square(Instruction):
    name: ClassVar[str] = "square"
    x: Annotated[View, READ]
    y: Annotated[View, Role(writes=True, amx_bf16=True)]


def square(trace: Trace, x: Symbol) -> Symbol:
    y = trace.new(like=x)
    return trace.append(Square(x.view, y.view), y)


"""
KERNEL = """

@triton.jit
def square_kernel(x, y, size, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    values = tl.load(x + at, mask=at < size)
    tl.store(y + at, values * values, mask=at < size)


def square(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    square_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), TILE=64)
    return y
"""
LAUNCH = """
    def square(self, x: torch.Tensor) -> torch.Tensor:
        return rows.square(x)
"""
CHANGES = {
    "types.py": [("\n    def logits(", CONTRACT + "\n    def logits(")],
    "composed.py": [("\n    def penalize(", DEFINITION + "\n    def penalize(")],
    "graph/operations.py": [
        ("OPERATIONS: Mapping", REGISTRATION + "OPERATIONS: Mapping"),
        ("            activation,\n", "            activation,\n            square,\n"),
    ],
    "cuda/rows.py": [("", KERNEL)],
    "cuda/provider.py": [("\n    # choosing tokens", LAUNCH + "\n    # choosing tokens")],
}
"""For each file of `src/quire/ops`: what is replaced by what (nothing: the end). Native files, which need a compiler,
are only read here."""
RUN = """
import numpy as np
from types import SimpleNamespace
from quire.ops.cpu import CpuOps
from quire.ops.graph.fuse import fuse
from quire.ops.graph.operations import trace
from quire.ops.graph.plan import plan_memory
from quire.ops.reference import ReferenceOps
from quire.ops.types import Ops

assert "square" in vars(Ops)
x = np.float32([[1, -2, 3, 0.5]])
for ops in (ReferenceOps(np), CpuOps(1, "baseline")):
    assert ops.square(x).tolist() == [[1, 4, 9, 0.25]]
table = SimpleNamespace(out_features=9, in_features=8, out_width=9, reads_amx_bf16=True)
head = SimpleNamespace(out_features=8, in_features=8, out_width=8, reads_amx_bf16=True)
program = fuse(trace(lambda ops, ids, batch, cache: ops.linear(ops.square(ops.embed(ids, table)), head)))
assert "%1[0: 8] = square(%0[0: 8])" in str(program), str(program)
assert program.buffers[1].layout == "amx_bf16", "made as what the GEMM reads"
assert plan_memory(program).is_local[:2] == (True, True)
"""
RUN_CUDA = """
import torch
from quire.ops.composed import ComposedOps
from quire.ops.cuda.provider import CudaOps

ops = CudaOps("cpu")
assert type(ops).square is not ComposedOps.square
assert ops.square(torch.tensor([[1.0, -2, 3, 0.5]])).tolist() == [[1, 4, 9, 0.25]]
"""


def listed() -> list[str]:
    """The files of the table, in its order."""
    text = (ROOT / "docs/howto/kernel.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \d+ \| `([^`]+)` \|", text, re.MULTILINE)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    return TreeCopy(ROOT, tmp_path_factory.mktemp("operation") / "tree", native_extension())


def added_to(tree: TreeCopy, *, without: str = "") -> None:
    """The tree with the operation in all files but one."""
    for name, changes in CHANGES.items():
        text = (ROOT / "src/quire/ops" / name).read_text(encoding="utf-8")
        for old, new in changes if name != without else []:
            assert old in text, (name, old)
            text = text.replace(old, new, 1) if old else text + new
        (tree.root / "src/quire/ops" / name).write_text(text, encoding="utf-8")


def runs(tree: TreeCopy, code: str) -> bool:
    environment = {**tree.environment, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tree.root, capture_output=True, text=True)
    return ran.returncode == 0


def test_an_operation_is_at_most_nine_files() -> None:
    assert len(set(listed())) == len(listed()) <= 9
    assert [f"src/quire/ops/{name}" for name in CHANGES] == [name for name in listed() if name.startswith("src")]


def test_the_files_of_the_table_make_an_operation_and_none_is_there_for_nothing(original: TreeCopy) -> None:
    added_to(original)
    assert runs(original, RUN)
    for name in ("types.py", "composed.py", "graph/operations.py"):
        added_to(original, without=name)
        assert not runs(original, RUN), name


def test_the_kernel_of_a_gpu(original: TreeCopy) -> None:
    pytest.importorskip("triton")
    added_to(original)
    assert runs(original, RUN_CUDA)
    added_to(original, without="cuda/provider.py")
    assert not runs(original, RUN_CUDA)


def test_native_files_are_those_of_an_operation_that_is_there() -> None:
    """By the activation, which is also called alone (`binding/module.cpp`); a new one need not be."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "native").rglob("*.[ch]*")
        if "ActivationArgs" in path.read_text(encoding="utf-8")
    }
    native = {name.replace("square", "activation") for name in listed() if name.startswith("native")}
    assert found == native | {"native/binding/module.cpp"}


def test_every_instruction_is_registered_in_native_code() -> None:
    names = {kind.name for kind in Instruction.__subclasses__() if kind.__module__.startswith("quire.")}
    assert {name for name in names if not hasattr(_native.Program, name)} == set()
