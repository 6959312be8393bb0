"""Overload of `quire serve` with the embedded model: first what it can do, then several times as much.

    python -m scripts.overload --seconds 120 --times 10

1. Closed loop: as many clients as rows give the rate that the server sustains.
2. Open loop at that rate and at TIMES that rate. Goodput counts answers that are whole and came within --slo seconds.

Prints one line of JSON for each: offered, goodput, refused, latency of refusals, values of Retry-After; and how many
processors the server's processes and the client used, and the host of a virtual machine took away meanwhile (nothing
here can be quicker than that). With --idle, the CPU time of a server that does nothing is measured first.

With --keys the server has two API keys and writes a record of each request: the flood comes with one of them, and a
guest with the other key asks at a quarter of the sustained rate; the guest has a line of its own.
"""

import argparse
import json
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]

ROWS, QUEUE, TOKENS = 16, 64, 128
BODY = json.dumps({"prompt": "What is PagedAttention?", "max_tokens": TOKENS, "ignore_eos": True}).encode()
FLOOD, GUEST = "flood-key", "guest-key"
GUEST_SHARE = 0.25  # of the sustained rate


def request_with(key: str | None) -> bytes:
    """A whole request."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
    )
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return f"{head}{authorization}Connection: close\r\n\r\n".encode() + BODY


@dataclass
class PhaseResult:
    """What came of the requests of one phase."""

    done_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def report(self, offered: int, seconds: float, slo_s: float, used: dict[str, float]) -> dict[str, Any]:
        """Figures, times in milliseconds."""
        good = sum(item <= slo_s for item in self.done_s)
        return {
            "offered_per_s": round(offered / seconds, 1),
            "goodput_per_s": round(good / seconds, 1),
            "answered": len(self.done_s),
            "statuses": dict(self.statuses),
            "latency_ms": {p: _percentile(self.done_s, p) for p in (50, 99)},
            "refusal_ms": {p: _percentile(self.refused_s, p) for p in (50, 99)},
            "retry_after_s": [min(self.retry_after_s, default=0), max(self.retry_after_s, default=0)],
            "processors": {name: round(value, 2) for name, value in used.items()},
        }


def _percentile(values: list[float], percent: int) -> float | None:
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1) if ordered else None


class Client:
    """Requests to a port, each on a connection of its own. Plain sockets: it shares the processors with the server, and
    what it uses is missing there."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._selector = selectors.DefaultSelector()
        self._open: dict[socket.socket, tuple[float, bytearray, PhaseResult, bytes]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def ask(self, key: str | None, tally: PhaseResult) -> None:
        """Begin a request."""
        connection = socket.socket()
        connection.setblocking(False)
        self._open[connection] = time.monotonic(), bytearray(), tally, request_with(key)
        connection.connect_ex(self._address)
        self._selector.register(connection, selectors.EVENT_WRITE)

    def turn(self, until_s: float) -> None:
        """Send and receive what there is, or wait for it until then."""
        for key, events in self._selector.select(max(0.0, until_s - time.monotonic())):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                if events & selectors.EVENT_WRITE:
                    connection.send(self._open[connection][3])
                    self._selector.modify(connection, selectors.EVENT_READ)
                elif data := connection.recv(2**16):
                    self._open[connection][1].extend(data)
                else:
                    self._end(connection, None)
            except OSError as error:
                self._end(connection, error)

    def _end(self, connection: socket.socket, error: OSError | None) -> None:
        begun_s, answer, tally, _ = self._open.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        spent_s = time.monotonic() - begun_s
        status = answer[9:12].decode() or "closed"
        tally.statuses[type(error).__name__ if error else status] += 1
        if status == "200":
            tally.done_s.append(spent_s)
        elif status in ("429", "503"):
            tally.refused_s.append(spent_s)
            found = re.search(rb"retry-after: (\d+)\r\n", answer, re.IGNORECASE)
            tally.retry_after_s.append(int(found[1]) if found else -1)


def closed_loop(port: int, key: str | None, clients: int, seconds: float) -> float:
    """Requests per second that are answered when so many clients ask one after another."""
    tally, end_s = PhaseResult(), time.monotonic() + seconds
    client = Client(port)
    while time.monotonic() < end_s or len(client):
        while time.monotonic() < end_s and len(client) < clients:
            client.ask(key, tally)
        client.turn(time.monotonic() + 1.0)
    return len(tally.done_s) / seconds


@dataclass
class Stream:
    """Requests at an even rate, whatever becomes of them."""

    key: str | None
    per_second: float
    asked: int = 0
    tally: PhaseResult = field(default_factory=PhaseResult)


def open_loop(port: int, streams: list[Stream], seconds: float) -> None:
    """All of them at once."""
    client, begun_s = Client(port), time.monotonic()
    last_s = begun_s + seconds + 30.0

    def due_s(stream: Stream) -> float:
        return begun_s + stream.asked / stream.per_second

    while True:
        going = [stream for stream in streams if due_s(stream) < begun_s + seconds]
        if not going and (not len(client) or time.monotonic() >= last_s):
            return
        for stream in going:
            while due_s(stream) <= min(time.monotonic(), begun_s + seconds):
                client.ask(stream.key, stream.tally)
                stream.asked += 1
        client.turn(min((due_s(stream) for stream in going), default=last_s))


def start(*, keys: bool) -> tuple[subprocess.Popen[str], int]:
    """A server, and its port."""
    command = [sys.executable, "-m", "quire", "serve", "--port", "0", "--quiet", "--max-num-seqs", str(ROWS)]
    command += ["--max-num-queued-reqs", str(QUEUE)]
    if keys:
        command += ["--api-key", FLOOD, "--api-key", GUEST, "--enable-log-requests"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return server, ready_port(server)


def ready_port(server: subprocess.Popen[str]) -> int:
    """The port of a server that starts, once it is ready."""
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"ready on http://[^:]+:(\d+)", line)
        if found:
            threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # its records are not kept
            return int(found[1])
    raise RuntimeError("the server did not start")


class Usage:
    """Processor time since it was made, of the server's processes, of this one and of the host, in processors."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        front = psutil.Process(server.pid)
        self._processes = {"http": [front], "core": front.children(recursive=True), "client": [psutil.Process()]}
        self._begun_s, self._before = time.monotonic(), self._read()

    def share(self) -> dict[str, float]:
        """Of each, on average."""
        spent_s = time.monotonic() - self._begun_s
        return {name: (now - self._before[name]) / spent_s for name, now in self._read().items()}

    def _read(self) -> dict[str, float]:
        used = {
            name: sum(sum(process.cpu_times()[:2]) for process in processes)
            for name, processes in self._processes.items()
        }
        return {**used, "stolen": getattr(psutil.cpu_times(), "steal", 0.0)}


def main() -> None:
    """Run the phases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--slo", type=float, default=10.0, metavar="S")
    parser.add_argument("--idle", type=float, default=0.0, metavar="S", help="measure an idle server for so long")
    parser.add_argument("--keys", action="store_true", help="two API keys and request logs; one key floods")
    options = parser.parse_args()
    key = FLOOD if options.keys else None
    server, port = start(keys=options.keys)
    try:
        closed_loop(port, key, 2, 1.0)  # everything that is made on first use
        if options.idle:
            usage = Usage(server)
            time.sleep(options.idle)
            used = usage.share()
            print(json.dumps({"phase": "idle", "share_of_a_core": round(used["http"] + used["core"], 4)}))
        rate = closed_loop(port, key, ROWS, min(6.0, options.seconds))
        print(json.dumps({"phase": "closed loop", "clients": ROWS, "per_s": round(rate, 1)}), flush=True)
        for times in (1.0, options.times):
            seconds = min(6.0, options.seconds) if times == 1.0 else options.seconds
            streams = [Stream(key, rate * times)]
            if options.keys:
                streams.append(Stream(GUEST, rate * GUEST_SHARE))
            usage = Usage(server)
            open_loop(port, streams, seconds)
            used = usage.share()
            for stream in streams:
                report = stream.tally.report(stream.asked, seconds, options.slo, used)
                print(json.dumps({"phase": f"{times:g} x", "key": stream.key, **report}), flush=True)
    finally:
        server.terminate()
        server.wait(40)


if __name__ == "__main__":
    main()
