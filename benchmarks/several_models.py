"""Seconds from `quire serve` to the first answer of each model: one server of all, and a server of each alone, in turn.

python benchmarks/several_models.py [--runs N] MODEL MODEL ...
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time

ADDRESS = "127.0.0.1"


def served(models: list[str], port: int) -> dict[str, float]:
    """Seconds to the first answer of each model, by its path."""
    names = [f"m{number}" for number in range(len(models))]
    command = [sys.executable, "-m", "quire", "serve", *models, "--port", str(port), "--quiet"]
    begun_s = time.perf_counter()
    found: dict[str, float] = {}
    command += ["--served-model-name", *names]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        threads = [
            threading.Thread(target=lambda one=one, name=name: found.update({one: answered(name, port) - begun_s}))
            for one, name in zip(models, names, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        process.terminate()
    return found


def answered(name: str, port: int) -> float:
    """When a model first gave a token."""
    body = json.dumps({"model": name, "prompt": "Hello", "max_tokens": 1})
    while True:
        connection = http.client.HTTPConnection(ADDRESS, port)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if connection.getresponse().status == 200:
                return time.perf_counter()
        except ConnectionError:
            pass
        finally:
            connection.close()
        time.sleep(0.01)


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--port", type=int, default=8499)
    options = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.runs + 1):
        turns = [options.models, *([one] for one in options.models)]
        for models in turns:
            for model, taken_s in served(models, options.port).items():
                seconds.setdefault((model, "beside others" if len(models) > 1 else "alone"), []).append(taken_s)
    for (model, how), found in sorted(seconds.items()):
        kept = found[1:]  # the first run warms the files
        spread = f"from {min(kept):.2f} to {max(kept):.2f}, {len(kept)} runs"
        print(f"{model} {how}: {statistics.median(kept):.2f} s ({spread})")


if __name__ == "__main__":
    main()
