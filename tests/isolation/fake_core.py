"""A core in its own process that computes nothing: `FakeExecutor`, with tokens in prompts that do harm.

Its argument `model_path` is a folder where it leaves marks, so that a harm can be done once.
"""

import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from quire.core.engine_core import EngineCore
from quire.core.limits import SchedulerConfig
from quire.core.plan import StepPlan, StepResult
from quire.core.policy import Fcfs
from quire.core.prefix_cache import PrefixCache
from quire.core.scheduler import Scheduler
from quire.engine.channel import CoreInfo
from quire.executor.fake import FakeExecutor
from quire.isolation.core_server import AnnouncingExecutor, CoreServer, die_with_parent
from quire.isolation.heartbeat import StepAllowance
from quire.isolation.wire import MAX_FRAME_BYTES, Ready, Start, StartFailed, Unframer, encode

DIES, DIES_ONCE, HANGS_ONCE, SPINS_ONCE, CRASHES_LATE, IS_KILLED_LATE, STOPS_LATE_ONCE = 90, 91, 92, 93, 94, 95, 96
"""Token ids in a prompt."""
LATE_TOKENS = 20
"""So many are given first."""
VOCAB_SIZE = 100
MAX_MODEL_LEN = 512
LIMITS = SchedulerConfig(32, 64, MAX_MODEL_LEN, 4, 600)
STEP_SECONDS = 0.002
_LATE_HARMS = (
    (CRASHES_LATE, signal.SIGSEGV),
    (IS_KILLED_LATE, signal.SIGKILL),
    (STOPS_LATE_ONCE, signal.SIGSTOP),
)


class HarmfulExecutor(FakeExecutor):
    """Does what the prompts of the rows in a step ask for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(num_blocks=600, block_size=4, max_num_seqs=32, vocab_size=VOCAB_SIZE)
        self._folder = folder
        self._ends: dict[int, tuple[int, int]] = {}
        """Row -> the length at which it does harm, the signal."""

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            prompt = new.token_ids[: new.num_prompt_tokens]
            self._do_harm(prompt)
            self._ends.pop(new.row, None)
            for token_id, how in _LATE_HARMS:
                if token_id in prompt and (how != signal.SIGSTOP or self._first_time("stopped")):
                    self._ends[new.row] = (len(prompt) + LATE_TOKENS, how)
        for item in plan.scheduled:
            length, how = self._ends.get(item.row, (MAX_MODEL_LEN + 1, signal.SIGKILL))
            if item.start + item.num_tokens >= length:
                os.kill(os.getpid(), how)
        time.sleep(STEP_SECONDS)
        return super().execute(plan)

    def _do_harm(self, prompt: tuple[int, ...]) -> None:
        if DIES in prompt or (DIES_ONCE in prompt and self._first_time("died")):
            os._exit(7)
        if HANGS_ONCE in prompt and self._first_time("hung"):
            time.sleep(300)
        if SPINS_ONCE in prompt and self._first_time("hung"):
            end_s = time.monotonic() + 300
            while time.monotonic() < end_s:
                pass

    def _first_time(self, name: str) -> bool:
        mark = self._folder / name
        if mark.exists():
            return False
        mark.touch()
        return True


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    connection = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent()
    frames = Unframer(Start, MAX_FRAME_BYTES)
    (start,) = frames.feed(connection.recv(2**16))
    if start.args.model == "missing":
        connection.sendall(encode(StartFailed("ModelFileError", "there is no such model", None)))
        return
    if start.args.model == "dies":
        os._exit(5)
    info = CoreInfo(MAX_MODEL_LEN, VOCAB_SIZE, (), "fingerprint")
    executor = AnnouncingExecutor(HarmfulExecutor(Path(start.model_path)), connection, StepAllowance(1))
    core = EngineCore(Scheduler(LIMITS, Fcfs(), PrefixCache(bytes(32))), executor, time.monotonic)
    connection.sendall(encode(Ready(info)))
    CoreServer(core, info, connection).run()


if __name__ == "__main__":
    main()
