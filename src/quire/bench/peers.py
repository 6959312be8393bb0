"""Engines in processes of their own, driven by `drivers/drive.py`: start, run, stop while another is timed, end."""

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from quire.bench.peer_answers import EngineInfo, PeerError, PeerMissing, RunResult, read
from quire.bench.workloads import Item

DRIVERS = Path(__file__).parent / "drivers"
GRACE_S = 10.0
MOST_LINE_BYTES = 64 << 20
"""Of one answer."""
KEPT_BYTES = 64 << 10
"""Of what an engine writes to its standard error, the last."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How an engine is started."""

    name: str
    driver: str
    """Path of the driver's file."""
    python: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


class EngineProcess:
    """One engine. Its processes are a group of their own, and none outlives this object's `with`.

    Raises:
        PeerMissing: its interpreter is not there.
    """

    def __init__(self, spec: Spec) -> None:
        self.name = spec.name
        self.facts = EngineInfo({}, {})
        self._settings = spec.settings
        self._rest = b""
        self._tail = b""
        environment = {"PYTHONUNBUFFERED": "1", **os.environ, **spec.environment}
        command = [spec.python, str(DRIVERS / "drive.py"), spec.driver]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerMissing(f"{spec.python} cannot be run ({error.strerror})") from error
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, timeout_s: float) -> None:
        """Wait until it is ready.

        Raises:
            PeerMissing: it is not installed.
            PeerError: it failed, with its own reason, or took longer than `timeout_s`.
        """
        self.facts = read(self._ask(self._settings, "ready", timeout_s), "ready", EngineInfo)

    def run(self, items: Sequence[Item], timeout_s: float) -> RunResult:
        """Seconds for the whole workload, and what was seen of each request.

        Raises:
            PeerError: it failed, took longer than `timeout_s`, or an output has not the length that was asked for.
        """
        ran = read(self._ask({"run": [asdict(item) for item in items]}, "ran", timeout_s), "ran", RunResult)
        lists = (ran.output_lens, ran.ttfts_s, ran.output_lens if ran.token_ids is None else ran.token_ids)
        if any(len(one) != len(items) for one in lists):
            raise PeerError(f"its driver's answer is not as the protocol has it (lists of {len(items)} were due)")
        for item, count in zip(items, ran.output_lens, strict=True):
            if count != item.num_output:
                raise PeerError(f"an output has {count} tokens where {item.num_output} were asked for")
        return ran

    def pause(self) -> None:
        """Take the processors from it while another is timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def forget_peak(self) -> None:
        """Let `peak_bytes` begin anew, where the system can (Linux)."""
        for pid in self._members():
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int | None:
        """The most memory that its processes held, shared pages counted for each; None where it is not known."""
        members = [pid for pid in self._members() if not (self.facts.is_client and pid == self._process.pid)]
        return sum(kilobytes * 1024 for pid in members for kilobytes in _high_water(pid)) or None

    def _members(self) -> list[int]:
        """Processes of its group."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, ValueError, IndexError):
                if int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[2]) == self._group:
                    found.append(int(path.parent.name))
        return found

    @property
    def _group(self) -> int:
        return self._process.pid

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)

    def _ask(self, message: Mapping[str, Any], kind: str, timeout_s: float) -> bytes:
        """Say a line, and the line that comes back, both before the time is over."""
        until_s = time.monotonic() + timeout_s
        try:
            with suppress(BrokenPipeError):  # it has ended: what it said last is read next
                self._send(json.dumps(message).encode() + b"\n", until_s)
            return self._line(kind, until_s)
        except TimeoutError as error:
            raise PeerError(f"no answer within {timeout_s:g} s") from error

    def _send(self, line: bytes, until_s: float) -> None:
        """Write as it reads: a pipe that is full takes no more, and this waits no longer than until then."""
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        while line:
            _await([], [pipe], until_s)
            line = line[os.write(pipe, line) :]

    def _line(self, kind: str, until_s: float) -> bytes:
        """The next line."""
        assert self._process.stdout is not None
        output, parts = self._process.stdout.fileno(), [self._rest]
        while b"\n" not in parts[-1]:
            _await([output], [], until_s)
            parts.append(os.read(output, 2**20))
            if not parts[-1]:
                raise PeerError(f"its process ended{self._said()}")
            if sum(map(len, parts)) > MOST_LINE_BYTES:
                raise PeerError(f"its driver said more than {MOST_LINE_BYTES >> 20} MiB where {kind} was due")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _listen(self) -> None:
        """Keep the end of its standard error."""
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while part := os.read(pipe.fileno(), KEPT_BYTES):
                self._tail = (self._tail + part)[-KEPT_BYTES:]

    def _said(self) -> str:
        """The last line of its standard error."""
        self._listener.join(1.0)  # no longer: what left its group may hold the pipe open
        text = self._tail.decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""

    def close(self, grace_s: float = GRACE_S) -> None:
        """End all its processes; those that do not leave within `grace_s` are killed."""
        self.resume()
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._listener.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(GRACE_S if kind is None else 0.0)


def _await(readable: Sequence[int], writable: Sequence[int], until_s: float) -> None:
    """Until one of them can be read or written; TimeoutError where that takes too long."""
    left_s = until_s - time.monotonic()
    if left_s <= 0 or not any(select.select(readable, writable, [], left_s)):
        raise TimeoutError


def _high_water(pid: int) -> list[int]:
    """VmHWM in kilobytes; nothing of a process that is gone."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        return [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")]
    return []
