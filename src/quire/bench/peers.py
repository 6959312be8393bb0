"""Engines in processes of their own, driven by `drivers/drive.py`: start, run, stop while another is timed, end."""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from quire.bench.workloads import Item
from quire.errors import QuireError

DRIVERS = Path(__file__).parent / "drivers"
GRACE_S = 10.0


class PeerError(QuireError):
    """An engine did not start, or failed; its own reason."""


class PeerMissing(PeerError):
    """An engine is not installed."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself when it is ready."""

    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    kv_bytes: int | None
    """Of its KV cache, by its own account; None where it has none that stays."""
    is_client: bool = False
    """The driver's process is a client of the engine, and no part of it: its memory does not count."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One workload. Lists are in the order of the requests."""

    elapsed_s: float
    ttfts_s: Sequence[float]
    """From the moment when all requests came."""
    output_lens: Sequence[int]
    token_ids: Sequence[Sequence[int]] | None = None
    """Of the outputs; None where an engine gives text alone."""
    kv_bytes: int | None = None
    """The most that its KV cache was at a time, where it grows with the requests."""


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
        self.facts = EngineInfo({}, {}, None)
        self._settings = spec.settings
        self._rest = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        environment = {"PYTHONUNBUFFERED": "1", **os.environ, **spec.environment}
        command = [spec.python, str(DRIVERS / "drive.py"), spec.driver]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerMissing(f"{spec.python} cannot be run ({error.strerror})") from error

    def start(self, timeout_s: float) -> None:
        """Wait until it is ready.

        Raises:
            PeerMissing: it is not installed.
            PeerError: it failed, with its own reason, or took longer than `timeout_s`.
        """
        self._send(self._settings)
        ready = self._receive("ready", timeout_s)
        try:
            self.facts = EngineInfo(**{"kv_bytes": None, **ready})
        except TypeError as error:
            raise PeerError(f"its driver's facts are not as the protocol has them ({error})") from error

    def run(self, items: Sequence[Item], timeout_s: float) -> RunResult:
        """Seconds for the whole workload, and what was seen of each request.

        Raises:
            PeerError: it failed, took longer than `timeout_s`, or an output has not the length that was asked for.
        """
        self._send({"run": [asdict(item) for item in items]})
        answer = self._receive("ran", timeout_s)
        try:
            ran = RunResult(**answer)
            wrong = [
                f"{count} tokens where {item.num_output} were asked for"
                for item, count in zip(items, ran.output_lens, strict=True)
                if count != item.num_output
            ]
            sound = ran.elapsed_s > 0 and len(ran.ttfts_s) == len(items)
        except (TypeError, ValueError) as error:
            raise PeerError(f"its driver's answer is not as the protocol has it ({error})") from error
        if wrong or not sound:
            raise PeerError(f"an output has {wrong[0]}" if wrong else "its driver's answer lacks times")
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

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: what it said last is read next
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, kind: str, timeout_s: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + timeout_s, timeout_s)
        try:
            message = json.loads(line)
            if "error" in message:
                raise (PeerMissing if message.get("missing") else PeerError)(str(message["error"]))
            answer = message[kind]
            if not isinstance(answer, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            text = (
                f"its driver said {line[:100]!r} where {kind} was due" if line else f"its process ended{self._said()}"
            )
            raise PeerError(text) from error
        return answer

    def _line(self, until_s: float, timeout_s: float) -> bytes:
        """The next line, or nothing at the end."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([output], [], [], left_s)[0]:
                raise PeerError(f"no answer within {timeout_s:g} s")
            part = os.read(output, 2**20)
            if not part:
                return b""
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _said(self) -> str:
        """The last line of its standard error."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 2**14, max(0, size - 2**14)).decode(errors="replace")
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
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(GRACE_S if kind is None else 0.0)


def _high_water(pid: int) -> list[int]:
    """VmHWM in kilobytes; nothing of a process that is gone."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        return [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")]
    return []
