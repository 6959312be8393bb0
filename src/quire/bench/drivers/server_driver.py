"""A server of OpenAI's kind: started by the setting `command` ({port} is filled in), or running at `url` already.

Requests go to /v1/completions as token ids and come back as a stream; the server's own `usage` counts tokens.
"""

import ctypes
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from typing import IO, Any
from urllib.parse import urlsplit

ANSWER_S = 1800
"""Silence after which a server is given up."""
KEPT_BYTES = 2**18
"""Of its log, the last: why it ended is among them."""


class Server:
    """One server, and what its clients see."""

    def __init__(self, settings: dict[str, Any]) -> None:
        if (module := settings.get("module")) and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}")
        self._process: subprocess.Popen[bytes] | None = None
        self._log = b""
        url = settings.get("url") or f"http://127.0.0.1:{_free_port()}"
        parts = urlsplit(url)
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._place, self._base = parts.netloc, parts.path.rstrip("/").removesuffix("/v1")
        command = [str(word).replace("{port}", str(parts.port)) for word in settings.get("command") or ()]
        if command:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )
            self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
            self._listener.start()
        try:
            self._model = self._await_model(settings["start_timeout_s"])
        except BaseException:
            self.close()
            raise
        flags = {"command": " ".join(command)} if command else {"url": url}
        self.facts = {
            "versions": dict(item for item in [self._version(settings)] if item),
            "settings": flags | {"over": "HTTP, token ids in, text out"},
            "kv_bytes": settings.get("kv_told"),
            "is_client": True,
        }

    def _await_model(self, timeout_s: float) -> str:
        """The name of its model, when it answers a request: llama-server names it while it loads it."""
        until = time.monotonic() + timeout_s
        question = {"prompt_token_ids": [1], "num_output": 1}
        while True:
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}: {self._last_words()}")
            connection = self._kind(self._place, timeout=5)
            with suppress(OSError, http.client.HTTPException, ValueError, LookupError, TypeError), closing(connection):
                connection.request("GET", self._base + "/v1/models")
                response = connection.getresponse()
                if response.status == 200:
                    self._model = str(json.loads(response.read())["data"][0]["id"])
                    self._ask(question, time.perf_counter(), {})
                    return self._model
            if time.monotonic() > until or self._process is None:
                raise TimeoutError(f"no answer from {self._place}")
            time.sleep(0.1)

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """All at once, a connection each."""
        seen: list[dict[str, Any]] = [{} for _ in items]
        begun = time.perf_counter()

        def ask(place: int) -> None:
            try:
                self._ask(items[place], begun, seen[place])
            except Exception as error:  # noqa: BLE001 -- raised below, in the thread that asked
                seen[place]["error"] = error

        threads = [threading.Thread(target=ask, args=(place,), daemon=True) for place in range(len(items))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - begun
        for one in seen:
            if "error" in one:
                raise one["error"]
        return {
            "elapsed_s": elapsed_s,
            "ttfts_s": [one["ttft_s"] for one in seen],
            "output_lens": [one["count"] for one in seen],
        }

    def _ask(self, item: dict[str, Any], begun: float, seen: dict[str, Any]) -> None:
        body = {
            "model": self._model,
            "prompt": item["prompt_token_ids"],
            "max_tokens": item["num_output"],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with closing(self._kind(self._place, timeout=ANSWER_S)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", self._base + "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status == 503:
                raise ConnectionError("the server answered 503: it is not ready")
            if response.status != 200:
                text = response.read(500).decode(errors="replace")
                raise RuntimeError(f"the server answered {response.status}: {text}")
            for line in response:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(str(event["error"])[:300])
                if event.get("choices"):
                    seen.setdefault("ttft_s", time.perf_counter() - begun)
                if event.get("usage"):
                    seen["count"] = event["usage"]["completion_tokens"]
        if "count" not in seen or "ttft_s" not in seen:
            raise RuntimeError("the server's stream had no token, or no usage")

    def _version(self, settings: dict[str, Any]) -> tuple[str, str] | None:
        if not settings.get("version_command"):
            return None
        done = subprocess.run(settings["version_command"], capture_output=True, text=True, timeout=120)
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return (settings["name"], lines[0][:80]) if lines else None

    def _listen(self, pipe: IO[bytes]) -> None:
        """Keep the end of its log."""
        with pipe:
            while part := os.read(pipe.fileno(), KEPT_BYTES):
                self._log = (self._log + part)[-KEPT_BYTES:]

    def _last_words(self) -> str:
        self._listener.join(1.0)  # no longer: what it started may hold the pipe open
        lines = [line for line in self._log.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def close(self) -> None:
        """End the server that was started."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, as in drive.py


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def start(settings: dict[str, Any]) -> Server:
    """A server that answers. What is not on this machine is a ModuleNotFoundError."""
    command = settings.get("command") or [sys.executable]
    if not os.path.exists(command[0]):
        raise ModuleNotFoundError(f"there is no {command[0]}")
    return Server(settings)
