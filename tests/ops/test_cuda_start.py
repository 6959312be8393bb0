"""What a start on a GPU says and keeps: one line for each obstacle, and compiled kernels that the next start finds."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import ConfigurationError
from quire.ops import select
from quire.ops.cuda.obstacles import obstacle

ROOT = Path(__file__).parents[2]


def torch_with(
    version: str = "2.9.1+cu130", cuda: str | None = "13.0", found: bool = True, capability: Any = (9, 0)
) -> Any:
    device = SimpleNamespace(
        is_available=lambda: found, get_device_capability=lambda: capability, get_device_name=lambda: "GeForce Old"
    )
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda), cuda=device)


def driver(error: Exception | None = None) -> Any:
    def target() -> str:
        if error is not None:
            raise error
        return "cuda:90"

    return SimpleNamespace(active=SimpleNamespace(get_current_target=target))


NO_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\n  at line 9")


@pytest.mark.parametrize(
    ("torch", "triton", "words"),
    [
        (torch_with(), driver(), None),
        (torch_with(version="2.10.0"), driver(), None),
        (torch_with(version="3.0.0a0+git1"), driver(), None),
        (torch_with(version="2.8.1+cu128"), driver(), "torch is 2.8.1+cu128; 2.9 or newer is needed"),
        (torch_with(cuda=None), driver(), "built without CUDA"),
        (torch_with(found=False), driver(), "finds no NVIDIA GPU that it can use (is there a driver for CUDA 13.0?)"),
        (torch_with(capability=(7, 5)), driver(), "GeForce Old has compute capability 7.5; 8.0 or newer is needed"),
        (torch_with(), driver(NO_COMPILER), "Triton cannot be used here: Failed to find C compiler. Please specify"),
        (torch_with(), driver(KeyError()), "Triton cannot be used here: KeyError"),
    ],
)
def test_each_obstacle_has_its_line(torch: Any, triton: Any, words: str | None) -> None:
    said = obstacle(torch, triton)
    assert said is None if words is None else said is not None and words in said and "\n" not in said


@pytest.mark.parametrize("missing", [["torch"], ["triton"], ["torch", "triton"]])
def test_missing_packages_are_named(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_missing_cuda_packages", lambda: missing)
    words = f"needs {' and '.join(missing)}: pip install 'quire.cuda.'"
    with pytest.raises(ConfigurationError, match=words) as caught:
        select.select_ops("cuda", None)
    assert caught.value.field == "device"


def test_auto_goes_on_with_the_processor_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(batch_invariant: bool) -> Any:
        raise ConfigurationError("device 'cuda': the driver is too old", field="device")

    monkeypatch.setattr(select, "_cuda_ops", refuse)
    monkeypatch.setattr(select, "_missing_cuda_packages", list)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    _, decisions = select.select_ops("auto", 1)
    assert (decisions[0].value, decisions[0].reason) == ("cpu", "auto: device 'cuda': the driver is too old")


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from quire.ops.cuda.kernel_cache import kernel_cache
from quire.ops.cuda.rows import activation_kernel
cache = kernel_cache()
assert kernel_cache() is cache
names = activation_kernel.arg_names
sizes = dict(KIND=0, MULTIPLY=True, TILE=64)
kinds = dict(x="*fp32", y="*fp32", x_stride="i32", size="i32")
signature = {name: kinds.get(name, "constexpr") for name in names}
compile(ASTSource(activation_kernel, signature, sizes), target=GPUTarget("cuda", 90, 32))
print(cache.num_compiled, cache.num_found, cache.folder)
"""


def start(home: Path, **more: str) -> tuple[list[str], str]:
    pytest.importorskip("triton")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    }
    environment |= {"TRITON_INTERPRET": "0", "HOME": str(home), "PYTHONPATH": str(ROOT / "src"), **more}
    ran = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(), ran.stderr


def test_the_second_start_compiles_nothing(tmp_path: Path) -> None:
    (compiled, found, folder), _ = start(tmp_path)
    assert (compiled, found) == ("1", "0")
    assert Path(folder).parent == tmp_path / ".cache" / "quire" / "kernels" and Path(folder).stat().st_mode & 0o77 == 0
    assert start(tmp_path)[0] == ["0", "1", folder]
    os.chmod(folder, 0o777)
    (compiled, found, other), said = start(tmp_path)
    assert (compiled, found) == ("1", "0") and other != folder
    assert "not kept for the next start" in said and "is not this user's alone to write" in said


def test_a_folder_that_the_user_names_is_used(tmp_path: Path) -> None:
    named = tmp_path / "named"
    assert start(tmp_path, TRITON_CACHE_DIR=str(named))[0] == ["1", "0", str(named)]


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    (compiled, *_), said = start(tmp_path, XDG_CACHE_HOME=str(blocked))
    assert compiled == "1" and "Not a directory" in said
