"""Requests that cost more than they look: how long the event loop stops, what others wait, what memory is taken.

    python -m scripts.costly_requests [NAME ...]

A server over a copy of the embedded model that claims 65,536 positions, with two API keys. One key sends each attack;
meanwhile the other asks for short chats, one after another, and a probe asks /livez every few milliseconds on a
connection of its own. Its longest answer is the longest stop of the loop, and what the machine does besides: that is
what `machine_ms` is for, by how much a process that only sleeps slept too long at most meanwhile.

Prints one line of JSON for each attack: statuses, seconds, bytes of the answers, longest and 99th percentile answer of
the probe, the guest's chats in milliseconds, and by how much the memory of the listener grew at most.
"""

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

import quire.demo
from scripts.overload import FLOOD, GUEST, ready_port

SLEEPER = """
import select, sys, time
longest_s = 0.0
while not select.select([sys.stdin], [], [], 0)[0]:
    begun_s = time.monotonic()
    time.sleep(0.003)
    longest_s = max(longest_s, time.monotonic() - begun_s - 0.003)
print(longest_s)
"""
POSITIONS = 65536
PROBE_S = 0.003
QUIET_S = 4.0
SENTENCE = "The quick brown fox jumps over the lazy dog. "
WORD = "a quick fox "


def _text(size: int) -> str:
    return (SENTENCE * (size // len(SENTENCE) + 1))[:size]


def _words(count: int, size: int) -> list[str]:
    return [f"{number:04d}" + (WORD * size)[: size - 4] for number in range(count)]


Requests = list[tuple[str, dict[str, Any]]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ATTACKS: dict[str, Callable[[], Requests]] = {
    "logprobs": lambda: [
        (COMPLETIONS, {"prompt": "x", "n": 128, "logprobs": 20, "max_tokens": 256, "ignore_eos": True})
    ],
    "logprobs, chat": lambda: [
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 96, "logprobs": True, "top_logprobs": 20,
                "max_tokens": 128, "ignore_eos": True})
    ],
    "prompt logprobs": lambda: [
        (COMPLETIONS, {"prompt": _text(12000), "n": 64, "prompt_logprobs": 20, "max_tokens": 1})
    ],
    "stop": lambda: [(COMPLETIONS, {"prompt": "x", "n": 128, "stop": _words(64, 1024), "max_tokens": 64})],
    "stop, once": lambda: [(COMPLETIONS, {"prompt": "x", "n": 100, "stop": _words(30, 1024), "max_tokens": 64})],
    "bad words": lambda: [(COMPLETIONS, {"prompt": ["x"] * 8, "bad_words": _words(256, 1024), "max_tokens": 2})],
    "bad words, once": lambda: [(COMPLETIONS, {"prompt": "x", "bad_words": _words(200, 1024), "max_tokens": 2})],
    "many prompts": lambda: [(COMPLETIONS, {"prompt": [_text(2000)] * 128, "max_tokens": 1})],
    "many ids": lambda: [(COMPLETIONS, {"prompt": [[5] * 4000] * 64, "max_tokens": 1})] * 4,
    "tokenize": lambda: [("/tokenize", {"prompt": _text(700000)})] * 60,
    "token texts": lambda: [("/tokenize", {"prompt": _text(700000), "return_token_strs": True})] * 4,
    "detokenize": lambda: [("/detokenize", {"tokens": [5 + item % 2000 for item in range(2**17)]})] * 20,
    "messages": lambda: [
        ("/tokenize", {"messages": [{"role": "user", "content": "hello there " * 20}] * 2000})
    ] * 20,
}  # fmt: skip


def start(directory: Path) -> tuple[subprocess.Popen[str], int]:
    """A server over the model in `directory`, and its port."""
    command = [sys.executable, "-m", "quire", "serve", str(directory), "--port", "0", "--quiet", "--max-num-seqs", "64"]
    command += ["--max-model-len", str(POSITIONS), "--kv-cache-memory-bytes", "536870912"]
    command += ["--api-key", FLOOD, "--api-key", GUEST]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return server, ready_port(server)


def copy_model(directory: Path) -> None:
    """The embedded model, with more positions."""
    source = Path(quire.demo.__file__).parent / "model"
    shutil.copytree(source, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))


def ask(port: int, key: str, path: str, body: bytes | None) -> tuple[int, int]:
    """The status of one request, and the bytes of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        size = 0
        while piece := answer.read(2**20):
            size += len(piece)
        return answer.status, size
    finally:
        connection.close()


class Watch:
    """Watches a server while something else is done to it."""

    def __init__(self, server: subprocess.Popen[str], port: int) -> None:
        self._process, self._port = psutil.Process(server.pid), port
        self._ended = threading.Event()
        self.stops_s: list[float] = []
        self.guest_s: list[float] = []
        self.guest_statuses: Counter[int] = Counter()
        self._rss = self._peak = self._process.memory_info().rss
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._sleeper: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-c", SLEEPER], **pipes)
        self._threads = [threading.Thread(target=item) for item in (self._probe, self._guest, self._memory)]
        for thread in self._threads:
            thread.start()

    def end(self) -> dict[str, Any]:
        """Stop watching. What was seen, in milliseconds and MB."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return {
            "longest_stop_ms": _percentile(self.stops_s, 100),
            "p99_stop_ms": _percentile(self.stops_s, 99),
            "machine_ms": round(1000 * float(self._sleeper.communicate()[0])),
            "guest_ms": {p: _percentile(self.guest_s, p) for p in (50, 100)},
            "guest": dict(self.guest_statuses),
            "grew_mb": round((self._peak - self._rss) / 2**20),
        }

    def _probe(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        while not self._ended.wait(PROBE_S):
            begun_s = time.monotonic()
            connection.request("GET", "/livez")
            connection.getresponse().read()
            self.stops_s.append(time.monotonic() - begun_s)
        connection.close()

    def _guest(self) -> None:
        content = "Tell me about paging. " * 110  # long enough for a thread
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4}).encode()
        while not self._ended.is_set():
            begun_s = time.monotonic()
            self.guest_statuses[ask(self._port, GUEST, CHAT, body)[0]] += 1
            self.guest_s.append(time.monotonic() - begun_s)

    def _memory(self) -> None:
        while not self._ended.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _percentile(values: list[float], percent: int) -> float | None:
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1) if ordered else None


def attack(port: int, bodies: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Send them all at once, and read the answers."""
    statuses: Counter[int] = Counter()
    sizes: list[int] = []

    def send(path: str, body: bytes) -> None:
        status, size = ask(port, FLOOD, path, body)
        statuses[status] += 1
        sizes.append(size)

    threads = [threading.Thread(target=send, args=item) for item in bodies]
    begun_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"statuses": dict(statuses), "seconds": round(time.monotonic() - begun_s, 1), "answer_bytes": sum(sizes)}


def main() -> None:
    """Run the attacks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ATTACKS))
    names = parser.parse_args().names or list(ATTACKS)
    with tempfile.TemporaryDirectory() as directory:
        copy_model(Path(directory))
        for name in [None, *names]:  # a server each: what one attack leaves behind does not count for the next
            server, port = start(Path(directory))
            try:
                ask(port, GUEST, CHAT, json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode())
                # Made before the watch begins: it would wait for that.
                bodies = [(path, json.dumps(body).encode()) for path, body in ATTACKS[name]()] if name else []
                watch, found = Watch(server, port), {}
                if name is None:
                    time.sleep(QUIET_S)
                else:
                    found = attack(port, bodies)
                print(json.dumps({"attack": name or "quiet", **found, **watch.end()}), flush=True)
            finally:
                server.terminate()
                server.wait(60)


if __name__ == "__main__":
    main()
