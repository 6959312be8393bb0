"""Which provider of the operations, which instruction set, how many threads: decided once, with reasons."""

import importlib.util
import math
import os
from pathlib import Path

from quire.errors import ConfigurationError
from quire.ops.types import Provider
from quire.outputs import Decision


def select_ops(device: str, threads: int | None, batch_invariant: bool = True) -> tuple[Provider, list[Decision]]:
    """The provider for `device` ("auto", "cpu", "cuda" or "reference") and each decision.

    `threads` None takes the physical cores that this process may use. `batch_invariant` False allows a GPU
    results that depend on the number of rows. The environment variable `QUIRE_ISA` (`baseline`, `avx2`, `avx512`,
    `avx512_vnni`, `avx512_bf16`, `amx`) forbids the instruction sets above the one that it names. Raises
    ConfigurationError.
    """
    if device == "reference":
        import numpy as np

        from quire.ops.reference import ReferenceOps

        return ReferenceOps(np), [Decision("operations", "reference", "as asked: plain array code, slow")]
    if device == "cuda":
        return _cuda_ops(batch_invariant), [Decision("operations", "cuda", "as asked")]
    device_reason = "as asked" if device == "cpu" else "auto: no NVIDIA GPU with quire[cuda] here"
    if device == "auto" and Path("/dev/nvidia0").exists() and not _missing_cuda_packages():
        try:
            reason = "auto: this machine has an NVIDIA GPU, and quire[cuda] is installed"
            return _cuda_ops(batch_invariant), [Decision("operations", "cuda", reason)]
        except ConfigurationError as error:
            device_reason = f"auto: {error.message}"
    if device not in ("auto", "cpu"):
        raise ConfigurationError(f"device {device!r} is not one of auto, cpu, cuda, reference", field="device")
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads is {threads}; at least 1 is needed", field="threads")

    from quire.ops.cpu import CpuOps

    isa, isa_reason, passed_over = select_instruction_set(os.environ.get("QUIRE_ISA"))
    count, threads_reason = (threads, "as asked") if threads is not None else available_cores()
    cores = core_processors()
    affinity = cores if count == len(cores) > 1 else []
    affinity_reason = (
        "one thread for each physical core"
        if affinity
        else f"{count} threads on {len(cores)} cores: the system places them"
    )
    return CpuOps(count, isa, affinity), [
        Decision("operations", "cpu", device_reason),
        Decision("instruction_set", isa, isa_reason, passed_over),
        Decision("threads", str(count), threads_reason),
        Decision("thread_affinity", "cores" if affinity else "none", affinity_reason),
    ]


def _missing_cuda_packages() -> list[str]:
    return [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]


def _cuda_ops(batch_invariant: bool) -> Provider:
    missing = " and ".join(_missing_cuda_packages())
    if missing:
        raise ConfigurationError(f"device 'cuda' needs {missing}: pip install 'quire[cuda]'", field="device")
    import torch
    from triton.runtime import driver

    from quire.ops.cuda.obstacles import obstacle

    reason = obstacle(torch, driver)
    if reason is not None:
        raise ConfigurationError(f"device 'cuda': {reason}", field="device")

    from quire.ops.cuda.kernel_cache import kernel_cache
    from quire.ops.cuda.provider import CudaOps

    kernel_cache()
    return CudaOps("cuda", batch_invariant)


def instruction_sets() -> list[str]:
    """The names of those that this build has and this processor runs, slowest first."""
    from quire.ops import _native

    return [name for name, runs, _ in _native.instruction_sets() if runs]


def compiled_instruction_sets() -> list[str]:
    """The names of all that this build has, whatever this processor runs."""
    from quire.ops import _native

    return [name for name, _, _ in _native.instruction_sets()]


def select_instruction_set(forced: str | None) -> tuple[str, str, list[str]]:
    """The best one that runs here, no better than `forced`; why, and a word on each that was passed over.

    Raises:
        ConfigurationError: `forced` is not a set of this build, or does not run here.
    """
    from quire.ops import _native

    candidates = _native.instruction_sets()
    names = [name for name, _, _ in candidates]
    if forced is not None and forced not in names:
        raise ConfigurationError(f"QUIRE_ISA={forced} is not one of {', '.join(names)}", field="QUIRE_ISA")
    remarks = []
    for name, runs, reason in reversed(candidates):
        if forced is not None and names.index(name) > names.index(forced):
            remarks.append(f"{name}: not with QUIRE_ISA={forced}")
        elif runs:
            return name, "the best that this processor runs" if forced is None else f"QUIRE_ISA={forced}", remarks
        else:
            remarks.append(f"{name}: {reason}")
    raise ConfigurationError("no compiled instruction set runs on this processor", field="device")


def available_cores() -> tuple[int, str]:
    """Physical cores among the processors that this process may use, no more than a cgroup's CPU quota pays for;
    at least 1. With where the number comes from."""
    cores = core_processors()
    reason = f"{len(cores)} physical cores of {sum(map(len, cores))} usable processors"
    quota = _cgroup_quota()
    if quota is not None and quota < len(cores):
        return max(1, math.floor(quota)), f"{reason}; the cgroup's quota is {quota:g} processors"
    return len(cores), reason


def core_processors() -> list[list[int]]:
    """The processors that this process may use, by physical core."""
    if hasattr(os, "sched_getaffinity"):
        processors = sorted(os.sched_getaffinity(0))
    else:
        processors = list(range(os.cpu_count() or 1))
    cores: dict[str, list[int]] = {}
    for processor in processors:
        cores.setdefault(_core_of(processor), []).append(processor)
    return list(cores.values())


def _core_of(processor: int) -> str:
    # Processors of one core list the same siblings; where the system does not say, each is its own core.
    path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(processor)


def _cgroup_quota() -> float | None:
    """Processors' worth of time that a cgroup (version 2, or 1) allows; None where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)
