"""The threads of the native code beside those of Python: what waits for what, what a fork leaves, missing memory.

What ends or hangs a process runs in one of its own. Its time limit is only for a hang: nothing is measured.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from quire.ops import _native
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import SampleBatch

HANG_S = 240
START = """
import gc, os, resource, sys, threading, time
import numpy as np
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch, CacheShape, QuantizedWeight, SampleBatch

def greedy(rows):
    zeros = np.zeros(rows, np.float32)
    return SampleBatch(zeros, np.zeros(rows, np.int32), zeros + 1, zeros, np.zeros(rows, np.uint64),
                       np.zeros(rows, np.int64))

def in_child(work):
    "The exit code of a fork that does `work`."
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException as error:
            print(repr(error), flush=True)
            code = 9
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

rng = np.random.default_rng(0)
"""


def run(script: str) -> None:
    """In a process of its own, where it prints "done" at its end."""
    text = START + textwrap.dedent(script) + '\nprint("done", flush=True)\n'
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        process.communicate()
        pytest.fail("hangs")
    assert process.returncode == 0 and output.endswith("done\n"), output + errors


def test_more_threads_come_while_those_that_are_there_wait_for_work() -> None:
    """A worker that reads what grows is seen by scripts/sanitize; here the threads must only all compute."""
    run("""
    x, weight = rng.standard_normal((300, 64), np.float32), rng.standard_normal((640, 64), np.float32)
    results = []
    for threads in range(1, 25):
        ops = CpuOps(threads, "baseline")
        results.append(ops.linear(x, ops.pack_linear(weight, None, "float32")))
    assert all(np.array_equal(result, results[0]) for result in results)
    """)


def test_a_forked_child_of_sleeping_workers_ends() -> None:
    run("""
    def states():
        for task in os.listdir("/proc/self/task"):
            if int(task) != os.getpid():
                with open(f"/proc/self/task/{task}/stat") as file:
                    yield file.read().rpartition(")")[2].split()[0]

    ops = CpuOps(4, "baseline")
    x = rng.standard_normal((64, 4096), np.float32)
    expected = ops.activation(x, "silu")
    while not all(state == "S" for state in states()):
        time.sleep(0.01)

    def work():
        global ops
        same = np.array_equal(ops.activation(x, "silu"), expected)  # by the caller alone
        fresh = CpuOps(3, "baseline")  # threads of the child's own
        same = same and np.array_equal(fresh.activation(x, "silu"), expected)
        del ops, fresh
        gc.collect()
        return 0 if same else 1

    assert in_child(work) == 0
    assert in_child(lambda: in_child(work)) == 0
    assert np.array_equal(ops.activation(x, "silu"), expected)
    """)


def test_a_fork_while_an_operation_runs_leaves_no_lock() -> None:
    run("""
    ops = CpuOps(2, "baseline")
    packed = ops.pack_linear(rng.standard_normal((512, 1024), np.float32), None, "float32")
    x = rng.standard_normal((256, 1024), np.float32)
    expected = ops.linear(x[:3], packed)
    ended = threading.Event()

    def keep_busy():
        while not ended.is_set():
            ops.linear(x, packed)

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]  # one of them is always inside
    for thread in threads:
        thread.start()

    def work():
        inherited = np.array_equal(ops.linear(x[:3], packed), expected)
        fresh = CpuOps(2, "baseline")
        return 0 if inherited and np.array_equal(fresh.linear(x[:3], packed), expected) else 1

    codes = [in_child(work) for _ in range(10)]
    ended.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * 10, codes
    """)


LIMITED = """
def limit(more):
    "To what the process has and so many bytes; None: no limit."
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else size + more, hard))

def lacks_memory(call):
    try:
        call()
    except MemoryError:
        return True
    return False
"""


def test_missing_scratch_memory_is_a_memory_error_and_no_more() -> None:
    run(
        LIMITED
        + """
vocabulary, rows = 2**22, 16  # 96 MB for each thread
ops = CpuOps(8, instruction_sets()[-1])
logits = np.broadcast_to(rng.standard_normal(vocabulary, np.float32), (rows, vocabulary))
batch = greedy(rows)
batch.temperature[:] = 1.0
x = rng.standard_normal((64, 4096), np.float32)
small = ops.activation(x, "silu")
limit(2**28)
for _ in range(3):
    assert lacks_memory(lambda: ops.sample(logits, batch))
    assert np.array_equal(ops.activation(x, "silu"), small)
limit(None)
assert len(set(ops.sample(logits, batch).tolist())) == 1
"""
    )


def test_missing_memory_of_a_token_tile_is_a_memory_error() -> None:
    """Token tiles are computed by workers that take memory themselves, in the middle of a job."""
    run(
        LIMITED
        + """
inputs, tokens = 2**17 - 64, 512  # a token tile's quantized activations are 34 MB
ops = CpuOps(4, instruction_sets()[-1])
weights = [
    QuantizedWeight("int8", rng.integers(-127, 128, (out, width), np.int8), np.ones((out, 1), np.float32), width)
    for out, width in ((8, inputs), (32, inputs))
]
table, packed = ops.pack_embedding(weights[0], "float32"), ops.pack_linear(weights[1], None, "float32")
forward = ops.compile(lambda ops, ids, batch, cache: ops.linear(ops.embed(ids, table), packed))
cache = ops.make_cache(CacheShape(1, 4, 16, 1, 8, "float32"))
ids = np.arange(tokens, dtype=np.int32) % 8
batch = AttentionBatch(
    np.zeros(tokens, np.int32), np.array([0, tokens], np.int32), np.zeros(1, np.int32),
    np.zeros((1, tokens // 16), np.int32),
)
limit(8 * tokens * inputs + 10**8)  # the step's own memory is there
assert lacks_memory(lambda: forward(ids, batch, cache))
limit(None)
assert np.array_equal(forward(ids, batch, cache), ops.linear(ops.embed(ids, table), packed))
"""
    )


class Busy:
    """A thread inside an operation that goes on for a long time, or until `end`."""

    ROWS, VOCABULARY = 400_000, 2**13

    def __init__(self) -> None:
        self.ops = CpuOps(2, instruction_sets()[-1])
        logits = np.random.default_rng(0).standard_normal(self.VOCABULARY, np.float32)
        self.logits = np.broadcast_to(logits, (self.ROWS, self.VOCABULARY))
        ones = np.ones(self.ROWS, np.float32)
        self.temperature = ones.copy()
        self.tokens = np.full(self.ROWS, -1, np.int32)
        columns = np.full(self.ROWS, 0.9, np.float32), np.zeros(self.ROWS, np.float32)
        numbers = np.zeros(self.ROWS, np.uint64), np.zeros(self.ROWS, np.int64)
        self.batch = SampleBatch(self.temperature, np.zeros(self.ROWS, np.int32), *columns, *numbers)
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        while self.tokens[0] < 0:
            time.sleep(0.001)

    def _sample(self) -> None:
        batch = self.batch
        columns = batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions
        self.ops._native.sample(self.logits, *columns, self.tokens)

    def goes_on(self) -> bool:
        return bool((self.tokens < 0).any())

    def end(self) -> None:
        self.temperature[:] = 0.0  # the rows that are left are quick
        self.thread.join()


@pytest.fixture
def switches_only_where_threads_wait() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    yield
    sys.setswitchinterval(before)


def empty_program(ops: CpuOps) -> Any:
    return ops._native.program([(0, 4, False, False), (4, 4, False, False)], 8, 0, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda ops, program: CpuOps(2, "baseline"),
        lambda ops, program: program.add((0, 0, 1, 4), (1, 0, 1, 4)),
        lambda ops, program: _native.operation_times(),
        lambda ops, program: ops.activation(np.zeros((1, 4), np.float32), "silu"),
    ],
    ids=["Runtime", "append", "operation_times", "operation"],
)
def test_what_waits_for_an_operation_lets_other_threads_run(
    call: Callable[[CpuOps, Any], Any], switches_only_where_threads_wait: None
) -> None:
    busy = Busy()
    program, calls = empty_program(busy.ops), threading.Event()

    def wait() -> None:
        calls.set()  # with no switch between here and the call
        call(busy.ops, program)

    waiting = threading.Thread(target=wait)
    waiting.start()
    calls.wait()
    ran_meanwhile = busy.goes_on()
    busy.end()
    waiting.join()
    assert ran_meanwhile
