"""`quire serve` as a process under trial, and what its clients see: for `kill_trials` and `soak`."""

import asyncio
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

POLL_SECONDS = 0.004
PR_SET_PDEATHSIG = 1


class Server:
    """`quire serve` on a free port.

    Args:
        arguments: flags and the model.
        log: the file that its standard error goes to.
        descriptors: the most that it may have open; None: as here.
    """

    def __init__(self, arguments: Sequence[str], log: Path, descriptors: int | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "quire", "serve", *arguments, "--port", "0", "--quiet"]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file

        def prepare() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, preexec_fn=prepare)
        while "ready on " not in self.said():
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start: {self.said()}")
            time.sleep(POLL_SECONDS)
        self.url = self.said().split("ready on ")[1].split()[0]

    def said(self) -> str:
        """All of its log."""
        return self.log.read_text(errors="replace")

    def core_pid(self) -> int | None:
        """The child that computes; None while there is none."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return next((int(word) for path in tasks for word in path.read_text().split()), None)

    def kill_core(self, how: signal.Signals) -> None:
        """Send a signal to the child that computes."""
        pid = self.core_pid()
        assert pid is not None, "there is no core"
        os.kill(pid, how)

    def end(self) -> int:
        """Let it finish; its exit code."""
        try:
            self.process.send_signal(signal.SIGTERM)
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@dataclass
class Part:
    """One sequence of an answer, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None

    def add(self, choice: dict[str, Any]) -> None:
        """What an event says."""
        told = choice["logprobs"] or {}
        self.text += choice["text"]
        self.token_ids += choice.get("token_ids", ())
        self.logprobs += told.get("token_logprobs", ())
        self.top_logprobs += told.get("top_logprobs") or ()
        self.prompt_logprobs = choice.get("prompt_logprobs") or self.prompt_logprobs
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.stop_reason = choice["stop_reason"] or self.stop_reason


@dataclass
class Answer:
    """All sequences of a request."""

    parts: dict[int, Part] = field(default_factory=dict)
    end: str = "cut off"
    """`done`, or what went wrong."""
    gap_s: float = 0.0
    """The longest time between two events."""

    def add(self, event: dict[str, Any], seen: list[int]) -> None:
        """What an event says."""
        if "error" in event:
            self.end = event["error"]["message"]
        for choice in event.get("choices", ()):
            self.parts.setdefault(choice["index"], Part()).add(choice)
            seen[0] += len(choice["text"])


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], seen: list[int]) -> Answer:
    """One answer put together, also one that `body` does not want as a stream; `seen[0]` counts its characters, and
    those of others."""
    answer, last_s = Answer(), time.perf_counter()
    async with client.stream("POST", f"{url}/completions", json={"stream": True, **body}) as response:
        if response.status_code != 200:
            answer.end = f"status {response.status_code}: {(await response.aread()).decode(errors='replace')}"
        elif not body.get("stream", True):
            answer.add(json.loads(await response.aread()), seen)
            answer.end = "done"
        else:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now_s = time.perf_counter()
                answer.gap_s, last_s = max(answer.gap_s, now_s - last_s), now_s
                if line == "data: [DONE]":
                    answer.end = "done"
                else:
                    answer.add(json.loads(line[6:]), seen)
    return answer


async def until(client: httpx.AsyncClient, server: Server, status: int, start_s: float) -> float:
    """Seconds since `start_s` until /readyz says `status`."""
    address = server.url.removesuffix("/v1") + "/readyz"
    while (await client.get(address)).status_code != status:
        if time.perf_counter() - start_s > 30:
            raise SystemExit(f"/readyz did not turn to {status} in 30 s")
        await asyncio.sleep(POLL_SECONDS)
    return time.perf_counter() - start_s


def open_client() -> httpx.AsyncClient:
    """As many connections as there are streams."""
    return httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None), trust_env=False)
