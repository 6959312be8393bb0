import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quire.errors import ConfigurationError
from quire.ops.cpu import CpuOps
from quire.ops.select import available_cores, instruction_sets, select_instruction_set, select_ops
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
