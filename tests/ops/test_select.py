import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quire.errors import ConfigurationError
from quire.ops import select
from quire.ops.cpu import CpuOps
from quire.ops.select import (
    available_cores,
    core_processors,
    instruction_sets,
    select_instruction_set,
    select_ops,
)
from quire.ops.types import AttentionBatch, CacheShape
from tests.conftest import PATIENCE_S
from tests.ops.cases import normal


def test_the_best_instruction_set_is_chosen_and_a_lower_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    names = instruction_sets()
    monkeypatch.delenv("QUIRE_ISA", raising=False)
    ops, decisions = select_ops("auto", 1)
    assert names[-1] in ops.name
    assert any(decision.value == names[-1] for decision in decisions)
    monkeypatch.setenv("QUIRE_ISA", "baseline")
    ops, _ = select_ops("cpu", 1)
    assert "baseline" in ops.name
    for name in names:
        assert select_instruction_set(name)[0] == name


def test_what_cannot_be_had_is_refused_by_name() -> None:
    absent = "tpu" if Path("/dev/nvidia0").exists() else "cuda"
    for device, threads, field in ((absent, None, "device"), ("tpu", None, "device"), ("cpu", 0, "threads")):
        with pytest.raises(ConfigurationError) as caught:
            select_ops(device, threads)
        assert caught.value.field == field
    with pytest.raises(ConfigurationError, match="QUIRE_ISA"):
        select_instruction_set("sse9")


def test_threads_by_default_are_the_cores_of_this_process() -> None:
    count, reason = available_cores()
    assert 1 <= count <= (os.cpu_count() or 1)
    assert str(count) in reason


CGROUPS = [
    ({"cpu.max": "max 100000"}, 4),
    ({"cpu.max": "150000 100000"}, 1),
    ({"cpu.max": "399999 100000"}, 3),
    ({"cpu.max": "50000 100000"}, 1),
    ({"cpu.max": "800000 100000"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ({}, 4),
]


@pytest.mark.parametrize(("files", "count"), CGROUPS, ids=lambda value: str(value))
def test_a_quota_of_processors_bounds_the_threads(
    files: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel's documentation has it: version 2 says `max`, version 1 says -1 where there is no limit."""

    def read_text(path: Path) -> str:
        name = path.as_posix().removeprefix("/sys/fs/cgroup/")
        if name not in files:
            raise FileNotFoundError(name)
        return files[name] + "\n"

    monkeypatch.setattr(select, "core_processors", lambda: [[0, 4], [1, 5], [2, 6], [3, 7]])
    monkeypatch.setattr(Path, "read_text", read_text)
    chosen, reason = available_cores()
    assert chosen == count
    assert ("quota" in reason) == (count < 4)


def test_threads_keep_to_cores_only_where_they_have_all_of_them() -> None:
    cores = core_processors()
    assert sorted(itertools.chain(*cores)) == sorted(os.sched_getaffinity(0))
    for threads in {1, len(cores), len(cores) + 1}:
        chosen = {item.name: item.value for item in select_ops("cpu", threads)[1]}["thread_affinity"]
        assert chosen == ("cores" if threads == len(cores) > 1 else "none")


def in_a_process_of_its_own(code: str) -> str:
    """What it prints; pools of other tests would take part."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    ).stdout


TASKS = """
import os, time
import numpy as np
from quire.ops.cpu import CpuOps
def native_threads(): return len(os.listdir("/proc/self/task")) - before
def multiply(ops):
    x = np.ones((64, 64), np.float32)
    return ops.linear(x, ops.pack_linear(np.ones((4096, 64), np.float32), None, "float32"))
before = len(os.listdir("/proc/self/task"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_engines_of_a_process_share_threads_and_leave_none() -> None:
    code = TASKS + "pools = [CpuOps(3, 'baseline'), CpuOps(2, 'baseline'), CpuOps(4, 'baseline')]\n"
    code += "for pool in pools: assert (multiply(pool) == 64).all()\n"
    code += "print(native_threads())\ndel pool, pools\nprint(native_threads())"
    assert in_a_process_of_its_own(code).split() == ["3", "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_threads_sleep() -> None:
    """Looked at until they do: on a busy machine a thread gets to the end of its spinning late."""
    code = TASKS + "pool = CpuOps(4, 'baseline')\nmultiply(pool)\n"
    code += "for _ in range(100):\n    start = time.process_time()\n    time.sleep(0.5)\n"
    code += "    if time.process_time() - start < 0.05:\n        print('asleep')\n        break"
    assert in_a_process_of_its_own(code).strip() == "asleep"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_computes_without_the_workers_of_its_parent() -> None:
    code = TASKS + "pool = CpuOps(3, 'baseline')\nmultiply(pool)\nchild = os.fork()\n"
    code += "if child == 0:\n    both = multiply(pool), multiply(CpuOps(2, 'baseline'))\n"
    code += "    os._exit(0 if all((one == 64).all() for one in both) else 1)\n"
    code += "print(os.waitpid(child, 0)[1])"
    assert in_a_process_of_its_own(code).strip() == "0"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_a_caller_keeps_its_own_affinity() -> None:
    before = os.sched_getaffinity(0)
    cores = core_processors()
    ops = CpuOps(2, instruction_sets()[0], [cores[0], cores[-1]])
    table = ops.pack_linear(normal(np.random.default_rng(0), 8, 8), None, "float32")
    step = ops.compile(lambda trace, token_ids, batch, cache: trace.embed(token_ids, table))
    ids = np.zeros(1, np.int32)
    batch = AttentionBatch(ids, np.array([0, 1], np.int32), ids, np.array([[0]], np.int32))
    cache = ops.make_cache(CacheShape(1, 1, 16, 1, 8, "float32"))
    for _ in range(50):
        step(ids, batch, cache)
    assert os.sched_getaffinity(0) == before


def test_several_callers_and_several_pools() -> None:
    """Each caller gets its own results while others use the same provider and another one."""
    rng = np.random.default_rng(0)
    weight = normal(rng, 700, 64)
    pools = [CpuOps(threads, instruction_sets()[-1]) for threads in (3, 2)]
    packed = [ops.pack_linear(weight, None, "float32") for ops in pools]
    inputs = [normal(rng, rows, 64) for rows in (1, 5, 20, 40)]
    expected = [pools[0].linear(x, packed[0]) for x in inputs]
    ready = threading.Barrier(4)

    def call(caller: int) -> bool:
        ready.wait()
        return all(
            np.array_equal(pools[n % 2].linear(inputs[caller], packed[n % 2]), expected[caller]) for n in range(60)
        )

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(call, range(4)))
