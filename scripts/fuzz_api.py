"""Fuzz the API of a server over the embedded model: no 5xx, no private text in an error, no change of the canary.

python -m scripts.fuzz_api [--seconds 60] [--requests 2000] [--seed 0]

First schemathesis, in all its phases and modes, against the server's own description, for so many seconds; then so many
requests of a corpus of our own: every field with values that parsers get wrong, bodies cut and flipped, odd methods,
paths and headers, every route of every door. Prints the requests counted by status. Exit 1 when something was found.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.llm import AsyncLLM
from quire.server.doors.all import DOORS
from quire.server.doors.anthropic import bodies as anthropic
from quire.server.doors.ollama import bodies as ollama
from quire.server.doors.openai.batches.routes import BATCH
from quire.server.doors.openai.bodies import CHAT, COMPLETION, DETOKENIZE, TOKENIZE_CHAT
from quire.server.doors.openai.responses.bodies import (
    CONVERSATION,
    CONVERSATION_ITEMS,
    CONVERSATION_UPDATE,
    INPUT_TOKENS,
    RESPONSE,
)
from quire.server.doors.tgi.bodies import GENERATE, PARAMETERS
from quire.server.http.app import create_app
from quire.server.http.limits import Limits
from quire.server.http.listen import bind
from quire.server.http.serve import GracefulServer
from quire.server.store.database import SqliteStore

KEY, MODEL = "fuzz", "fuzzed"
HELLO = [{"role": "user", "content": "hi"}]
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,ignored_auth,unsupported_method,allow_header_conformance"
)
PRIVATE = re.compile(rb'0x[0-9a-f]{6,}|/home|/usr|/tmp|site-packages|Traceback|File "')
ROUTES = {
    "/v1/completions": (COMPLETION, {"prompt": "a b", "max_tokens": 2}),
    "/v1/chat/completions": (CHAT, {"messages": HELLO, "max_tokens": 2}),
    "/tokenize": (TOKENIZE_CHAT, {"messages": HELLO}),
    "/generate": (GENERATE, {"inputs": "a b", "parameters": {"max_new_tokens": 2}}),
    "/generate_stream": (PARAMETERS, {"inputs": "a b", "parameters": {"max_new_tokens": 2}}),
    "/": (PARAMETERS, {"inputs": "a b", "parameters": {"max_new_tokens": 2}}),
    "/chat_tokenize": (CHAT, {"messages": HELLO}),
    "/detokenize": (DETOKENIZE, {"tokens": [1, 2, 3]}),
    "/v1/responses": (RESPONSE, {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2}),
    "/v1/responses/input_tokens": (INPUT_TOKENS, {"input": [{"role": "user", "content": "hi"}], "model": MODEL}),
    "/v1/conversations": (CONVERSATION, {"items": [{"role": "user", "content": "hi"}]}),
    "/v1/conversations/conv_2": (CONVERSATION_UPDATE, {"metadata": {"a": "2"}}),
    "/v1/conversations/conv_2/items": (CONVERSATION_ITEMS, {"items": [{"role": "user", "content": "hi"}]}),
    "/v1/batches": (BATCH, {"input_file_id": "file-2", "endpoint": "/v1/responses", "completion_window": "24h"}),
    "/v1/messages": (anthropic.MESSAGES, {"model": MODEL, "messages": HELLO, "max_tokens": 2}),
    "/v1/messages/count_tokens": (anthropic.COUNT, {"model": MODEL, "messages": HELLO}),
    "/api/chat": (ollama.CHAT, {"model": MODEL, "messages": HELLO, "options": {"num_predict": 2}}),
    "/api/generate": (ollama.GENERATE, {"model": MODEL, "prompt": "a b", "options": {"num_predict": 2}}),
    "/api/show": (ollama.SHOW, {"model": MODEL}),
    "/api/pull": (ollama.PULL, {"model": MODEL}),
    "/api/copy": (ollama.COPY, {"source": MODEL, "destination": "2"}),
}
FORM = (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: '
        b'form-data; name="file"; filename="2"\r\n\r\n{"custom_id": "2"}\r\n--b--\r\n')  # fmt: skip
QUERIES = ("", "?limit=2", "?limit=-1", "?order=up", "?after=x", "?stream=true", "?stream=2", "?starting_after=9")
NAMES = (
    *("resp_2", "conv_2", "file-2", "batch_2", MODEL, "2", "x" * 300, "%00", "%2e%2e", "..%2f..", "%E2%80%AE", "%FF"),
    *("sha256:" + "2" * 64, "a%20b", "{id}"),
)
"""In the place of what a path names."""
ATOMS: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1", "\0", "\r\nx: y", "\u202e", "e\u0301" * 300, "<|im_end|>" * 20, " " * 5000),
    *(-(2**63) - 1, -(2**31), -100, -1, -0.0, 0, 1e-300, 0.5, 1, 2, 3, 20, 21, 101, 129, 2**31, 2**53 + 1, 2**63),
    *([], {}, [[]], [None], ["x"] * 300, [0] * 5000, [-1], [2**31], [2**64], {"1": 1}, {"1": 1e308}, {"-1": 0}),
)  # fmt: skip
LITERALS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 2000 + b"]" * 2000, b"\xff")
CANARY = {"prompt": "The quick", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 2}


class Counting:
    """Counts answers by status, and looks into those that are errors."""

    def __init__(self, app: ASGIApp, statuses: Counter[int], findings: list[str]) -> None:
        self._app, self._statuses, self._findings = app, statuses, findings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look."""
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._statuses[status] += 1
                if status >= 500:
                    self._findings.append(f"{status} from {scope['method']} {scope['path'][:80]!r}")
            elif status >= 400 and PRIVATE.search(message.get("body", b"")):
                self._findings.append(f"private text in {status} from {scope['path'][:80]!r}")
            await send(message)

        await self._app(scope, receive, watch)


class Server:
    """The server under test."""

    def __init__(self, statuses: Counter[int], findings: list[str]) -> None:
        self.engine = AsyncLLM(max_model_len=96, max_num_seqs=16, max_num_batched_tokens=512)
        store = SqliteStore(None, most_bytes=2**24, days=1)
        limits = Limits().with_values({"sequences": 8, "prompts": 8})
        app = create_app(self.engine, apis=DOORS, served_model_name=MODEL, api_key=KEY, limits=limits, store=store)
        app.add_middleware(Counting, statuses=statuses, findings=findings)
        listener, ready = bind("127.0.0.1", 0), threading.Event()
        self.port = listener.getsockname()[1]
        self._server = GracefulServer(app, on_ready=ready.set)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        if not ready.wait(30):
            raise TimeoutError("the server did not start")

    def close(self) -> None:
        """Stop it, and see that the core has nothing left over."""
        self._server.drain()
        self._thread.join(60)
        self.engine.close()


def canary(port: int) -> dict[str, Any]:
    """The same request each time; its answer without what may differ."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(CANARY), headers)
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return {name: answer.get(name) for name in ("choices", "error")}


def schemathesis(port: int, seconds: int, seed: int) -> int:
    """Its exit code: 0 when nothing was found."""
    command = [
        *(str(Path(sys.executable).with_name("st")), "--config-file", "/dev/null", "run"),
        f"http://127.0.0.1:{port}/openapi.json",
        *(
            "--header",
            f"Authorization: Bearer {KEY}",
            "--mode",
            "all",
            "--phases",
            "examples,coverage,fuzzing,stateful",
        ),
        *("--checks", CHECKS, "--max-time", str(seconds), "--seed", str(seed), "--request-timeout", "30", "--no-color"),
        *("--continue-on-failure", "--suppress-health-check", "all", "--generation-database", ":memory:"),
    ]
    with tempfile.TemporaryDirectory() as directory:  # where it leaves what it found
        return subprocess.run(command, check=False, timeout=6 * seconds + 60, cwd=directory).returncode


def one_request(chance: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of the next request."""
    if chance.random() < 0.2:
        return _of_any_route(chance)
    path = chance.choice(list(ROUTES))
    schema, base = ROUTES[path]
    body = dict(base)
    held = body
    if schema is PARAMETERS:  # whose fields stand in an object of the body
        held = body["parameters"] = dict(body["parameters"])
    for name in chance.sample(schema.known(), min(chance.randint(1, 3), len(schema.known()))):
        held[name] = chance.choice(ATOMS)
    if path in ("/api/chat", "/api/generate") and chance.random() < 0.5:
        body["options"] = {chance.choice(ollama.OPTIONS_SCHEMA.known()): chance.choice(ATOMS), "num_predict": 2}
    data = json.dumps(body).encode()
    kind = chance.random()
    if kind < 0.1:
        data = data.replace(b"2", chance.choice(LITERALS), 1)
    elif kind < 0.2:
        data = data[: chance.randrange(len(data))]
    elif kind < 0.3:
        place = chance.randrange(len(data))
        data = data[:place] + chance.randbytes(chance.randint(1, 4)) + data[place + 1 :]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    method = "POST"
    if kind > 0.9:
        headers |= {chance.choice(["X-Odd", "Content-Type", "Authorization", "Content-Encoding", "Host"]): "odd, \xff"}
    elif kind > 0.85:
        method, path = (
            chance.choice(["GET", "PUT", "BREW", "HEAD", "OPTIONS"]),
            chance.choice(["/", path, "//v1", "/%2f"]),
        )
    return method, path, data, headers


def _of_any_route(chance: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A file, whole or not; or any route of any door by its own methods, mostly of something that is not there."""
    headers = {"Authorization": f"Bearer {KEY}"}
    if chance.random() < 0.5:
        place = chance.randrange(len(FORM))
        data = FORM[:place] + chance.randbytes(chance.randint(0, 3)) + FORM[place + chance.randint(0, 9) :]
        return "POST", "/v1/files", data, headers | {"Content-Type": "multipart/form-data; boundary=b"}
    door = chance.choice(DOORS)
    route = chance.choice(door.routes)
    path = re.sub(r"\{\w+(:path)?\}", lambda _: chance.choice(NAMES), route.path) + chance.choice(QUERIES)
    method = chance.choice(sorted(route.methods or ()))
    if door.marker and chance.random() < 0.7:
        headers[door.marker] = "2023-06-01"
    if method in ("GET", "HEAD") or chance.random() < 0.3:
        return method, path, b"", headers
    body = {chance.choice(("model", "name", "source", "x")): chance.choice(ATOMS)}
    return method, path, json.dumps(body).encode(), headers | {"Content-Type": "application/json"}


def corpus(port: int, count: int, seed: int, findings: list[str]) -> None:
    """Send `count` requests of our own."""
    chance = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(count):
        request = one_request(chance)
        try:
            connection.request(request[0], request[1], request[2], request[3])
            connection.getresponse().read()
        except (http.client.HTTPException, OSError) as error:
            connection.close()  # the server closes what is not HTTP; the canary tells whether it lives
            if isinstance(error, TimeoutError):
                findings.append(f"no answer to request {number} of seed {seed}: {request[1]}")
    connection.close()


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for schemathesis; 0 leaves it out")
    parser.add_argument("--requests", type=int, default=2000, help="of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    findings: list[str] = []
    server, started = Server(statuses, findings), time.monotonic()
    try:
        before = canary(server.port)
        if options.seconds and schemathesis(server.port, options.seconds, options.seed):
            findings.append("schemathesis found something: see above")
        corpus(server.port, options.requests, options.seed, findings)
        if canary(server.port) != before:
            findings.append("the canary's answer changed")
    finally:
        server.close()
    counted = ", ".join(f"{status}: {number:,}" for status, number in sorted(statuses.items()))
    print(f"{sum(statuses.values()):,} requests in {time.monotonic() - started:.0f} s: {counted}")
    for text, number in Counter(findings).most_common(20):
        print(f"FOUND {number} x {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
