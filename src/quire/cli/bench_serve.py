"""`quire bench serve`: load on a running server; `quire bench compare`: two results beside each other."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.bench_dataset import CUSTOM, LENGTHS, NUM_PROMPTS, RANDOM, RANDOM_LENGTHS, named, sharegpt_loads
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.bench.serving import Ask, Chunk, Load

EXAMPLES = """examples:
  quire bench serve --num-prompts 100 --request-rate 4
  quire bench serve --base-url http://host:8000 --dataset-name sharegpt-lengths --max-concurrency 16 \\
      --goodput ttft:500 tpot:50
  quire bench serve --save-result --save-detailed --result-filename a.json
  quire bench compare a.json b.json

The flags listed here are vLLM's (but --max-model-len), and so are the names of the figures. Without --request-rate all
requests are sent at once; with it they come at random (--burstiness). The intervals of compare are of the requests
within two runs: what else the machine did in one of them is not chance, and makes two runs of one server differ too."""
ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
MOST_PROMPTS = 100_000
MOST_OPEN = 1024
"""Threads of this program: what has no bound of its own waits here past it."""


def add(kinds: Any) -> None:
    """The flags of both."""
    serve = kinds.add_parser(
        "serve",
        help="load on a running server: TTFT, TPOT, throughput, goodput",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = serve.add_argument
    flag("--base-url", metavar="URL", help="the server; left out: http://HOST:PORT")
    flag("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    flag("--port", type=int, default=8000, help="(default: 8000)")
    flag("--backend", choices=[*ENDPOINTS], default="openai", help="completions, or chat completions (default: openai)")
    flag("--endpoint", metavar="PATH", help="where it takes requests (default: the backend's own path)")
    flag("--model", metavar="NAME", help="which of its models; left out: its first")
    flag("--api-key", metavar="KEY", help="the server's key, if it has one")
    flag(
        "--dataset-name",
        type=named,
        choices=(RANDOM, LENGTHS, CUSTOM),
        default=RANDOM,
        help="(default: random) sharegpt-lengths: random tokens, lengths like those of ShareGPT",
    )
    flag("--dataset-path", metavar="FILE", help="for custom: a line of JSON for each request, prompt and output_tokens")
    flag("--num-prompts", type=int, default=NUM_PROMPTS, metavar="N", help="requests (default: 1000)")
    num_in, num_out = RANDOM_LENGTHS
    flag("--random-input-len", type=int, default=num_in, metavar="N", help=f"tokens of a prompt (default: {num_in})")
    flag("--random-output-len", type=int, default=num_out, metavar="N", help=f"of an answer (default: {num_out})")
    flag("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths within this share of these")
    flag("--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    text = "sharegpt-lengths: longest prompt and answer (2048)"
    flag("--max-model-len", type=int, default=2048, metavar="N", help=text)
    flag("--request-rate", type=float, default=math.inf, metavar="R", help="requests a second; left out: all at once")
    flag("--burstiness", type=float, default=1.0, metavar="B", help="1: at random; below: in bursts; above: evenly")
    flag("--max-concurrency", type=int, metavar="N", help="requests open at a time")
    flag("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="answers have their whole length")
    flag("--temperature", type=float, default=0.0, help="(default: 0)")
    flag("--percentile-metrics", default="ttft,tpot,itl", metavar="NAMES", help="of ttft, tpot, itl, e2el")
    flag("--metric-percentiles", default="99", metavar="NUMBERS", help="which percentiles (default: 99)")
    flag("--goodput", nargs="+", default=[], metavar="NAME:MS", help="what a good request keeps: ttft:500 tpot:50")
    flag("--num-warmups", type=int, default=1, metavar="N", help="requests before, which are not counted (default: 1)")
    flag("--seed", type=int, default=0, help="(default: 0)")
    flag("--label", metavar="TEXT", help="kept in the result")
    flag("--save-result", action="store_true", help="write the figures as JSON")
    flag("--save-detailed", action="store_true", help="and what was seen of each request")
    flag("--result-dir", metavar="DIR", help="where to (default: here)")
    flag("--result-filename", metavar="FILE", help="its name")
    flag("--disable-tqdm", action="store_true", help="show no bar")
    compare = kinds.add_parser(
        "compare",
        help="two results of bench serve, with intervals of their ratios (engines beside each other: quire compare)",
        allow_abbrev=False,
    )
    compare.add_argument("first", metavar="A.json", help="of --save-result --save-detailed")
    compare.add_argument("second", metavar="B.json", help="another, which is divided by A")
    compare.add_argument("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Load, print, write."""
    from tqdm.auto import tqdm

    from quire.bench import serving
    from quire.cli.remote_server import Server

    _check(options)
    percents, goodput = _percents(options.metric_percentiles), _goodput(options.goodput)
    shown = _names(options.percentile_metrics)
    server = Server(options.base_url or f"http://{options.host}:{options.port}", options.api_key)
    server.model_name = options.model or server.first_model()
    loads = _loads(options)
    rate, count = options.request_rate, len(loads)
    arrivals = serving.arrival_times(count, rate, options.burstiness, options.seed)
    ask = _ask(server, options)
    for place in range(options.num_warmups):  # the first also says whether the server takes such
        list(ask(loads[place % count]))
    open_at_once = min(options.max_concurrency or MOST_OPEN, MOST_OPEN)
    with tqdm(total=count, desc="requests", dynamic_ncols=True, disable=options.disable_tqdm) as bar:
        seen, duration_s = serving.run(loads, arrivals, ask, open_at_once, lambda one: bar.update())
    facts = {
        "backend": options.backend,
        "label": options.label,
        "model_id": server.model_name,
        "tokenizer_id": server.model_name,
        "num_prompts": count,
        "dataset_name": options.dataset_name,
        "dataset_path": options.dataset_path,
        "seed": options.seed,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    found = serving.result(seen, duration_s, percents, goodput, facts)
    print("\n".join(lines(found, shown, percents)))
    if options.save_result:
        _save(found, options)
    return int(found["completed"] == 0)


def _check(options: argparse.Namespace) -> None:
    whole = {
        "num_prompts": (1, MOST_PROMPTS),
        "random_input_len": (1, 2**20),
        "random_output_len": (1, 2**20),
        "random_prefix_len": (0, 2**20),
        "max_model_len": (16, 2**24),
        "max_concurrency": (1, MOST_OPEN),
        "num_warmups": (0, MOST_PROMPTS),
    }
    for name, (low, high) in whole.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ConfigurationError(f"{name} must be between {low} and {high}, got {value}", field=name)
    if options.endpoint is not None and not options.endpoint.startswith("/"):
        raise ConfigurationError(f"endpoint must begin with /, got {options.endpoint[:80]!r}", field="endpoint")
    for name in ("request_rate", "burstiness"):
        if not getattr(options, name) > 0:
            raise ConfigurationError(f"{name} must be above 0, got {getattr(options, name)}", field=name)
    if not 0 <= options.random_range_ratio < 1:
        raise ConfigurationError("random_range_ratio must be in [0, 1)", field="random_range_ratio")
    if (options.dataset_name == CUSTOM) != (options.dataset_path is not None):
        raise ConfigurationError("dataset_path goes with --dataset-name custom", field="dataset_path")


def _percents(text: str) -> list[float]:
    try:
        found = [float(item) for item in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= percent <= 100 for percent in found):
        raise ConfigurationError(
            f"metric_percentiles must be numbers such as 50,99, got {text!r}", field="metric_percentiles"
        )
    return found


def _names(text: str) -> list[str]:
    from quire.bench.serving import METRICS

    found = [name.strip() for name in text.split(",")]
    if not {*found} <= {*METRICS}:
        text = f"percentile_metrics must be of {', '.join(METRICS)}, got {text!r}"
        raise ConfigurationError(text, field="percentile_metrics")
    return found


def _goodput(items: list[str]) -> dict[str, float]:
    found = {}
    for item in items:
        name, _, bound = item.partition(":")
        try:
            found[name] = float(bound)
        except ValueError:
            found[name] = math.nan
        if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
            raise ConfigurationError(f"goodput must be ttft:MS, tpot:MS or e2el:MS, got {item!r}", field="goodput")
    return found


def _loads(options: argparse.Namespace) -> "list[Load]":
    from quire.bench.serving import random_loads

    as_text = options.backend == "openai-chat"
    if options.dataset_name == LENGTHS:
        return sharegpt_loads(options.num_prompts, options.max_model_len, options.seed, as_text=as_text)
    if options.dataset_name == RANDOM:
        return random_loads(
            options.num_prompts,
            options.random_input_len,
            options.random_output_len,
            options.random_range_ratio,
            options.random_prefix_len,
            options.seed,
            as_text=as_text,
        )
    return _custom(Path(options.dataset_path), options)


def _custom(path: Path, options: argparse.Namespace) -> "list[Load]":
    from quire.bench.serving import Load

    found: list[Load] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(found) == options.num_prompts:
                    break
                try:
                    item = json.loads(line)
                    prompt, count = item["prompt"], item.get("output_tokens", options.random_output_len)
                    if not isinstance(prompt, str) or type(count) is not int or count < 1:
                        raise ValueError("prompt is a text, output_tokens a whole number above 0")
                except (KeyError, TypeError, ValueError) as error:
                    text = (
                        f'{path.name}, line {number}: a line is like {{"prompt": "Hi", "output_tokens": 64}} ({error})'
                    )
                    raise ConfigurationError(text, field="dataset_path") from error
                found.append(Load(prompt, len(prompt.split()), count))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", field="dataset_path") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path.name} is not UTF-8 text", field="dataset_path") from error
    if not found:
        raise ConfigurationError(f"{path.name} has no line", field="dataset_path")
    return found


def _ask(server: Any, options: argparse.Namespace) -> "Ask":
    """How a request is sent, and what its events say."""
    from quire.bench.serving import Chunk

    is_chat, path = options.backend == "openai-chat", options.endpoint or ENDPOINTS[options.backend]

    def ask(load: "Load") -> "Iterator[Chunk]":
        body: dict[str, Any] = {
            "max_tokens": load.num_output,
            "temperature": options.temperature,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        body |= {"messages": [{"role": "user", "content": load.prompt}]} if is_chat else {"prompt": load.prompt}
        for event in server.stream(path, body):
            usage = event.get("usage") or {}
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {} if is_chat else choice
                parts = [delta.get(name) for name in ("text", "content", "reasoning", "reasoning_content")]
                text = next((part for part in parts if part), "")
                # A token may make no text yet; the first event of a chat holds the role alone.
                if text or not (is_chat and delta.get("role")):
                    yield Chunk(text) if text or not choice.get("finish_reason") else Chunk("", None, 0)
            if usage:
                yield Chunk("", usage.get("prompt_tokens"), usage.get("completion_tokens"))

    return ask


def _save(found: dict[str, Any], options: argparse.Namespace) -> None:
    each = (*"input_lens output_lens ttfts itls latencies start_times generated_texts errors".split(),)
    kept = found if options.save_detailed else {name: value for name, value in found.items() if name not in each}
    name = options.result_filename or f"{options.backend}-{found['num_prompts']}-{found['date']}.json"
    path = Path(options.result_dir or ".") / name
    try:
        path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})", field="result_filename") from error
    print(f"written to {path}", file=sys.stderr)


def lines(found: dict[str, Any], names: list[str], percents: list[float]) -> list[str]:
    """The figures for people."""
    shown = [
        ("requests done", f"{found['completed']}"),
        ("requests failed", f"{found['failed']}"),
        ("seconds", f"{found['duration']:.2f}"),
        ("tokens in", f"{found['total_input_tokens']}"),
        ("tokens out", f"{found['total_output_tokens']}"),
        ("requests a second", f"{found['request_throughput']:.2f}"),
        ("tokens out a second", f"{found['output_throughput']:.2f}"),
        ("tokens a second", f"{found['total_token_throughput']:.2f}"),
    ]
    if found["request_goodput"] is not None:
        shown.append(("good requests a second", f"{found['request_goodput']:.2f}"))
    for name in names:
        for kind in ("mean", "median", *(f"p{percent:g}" for percent in percents)):
            shown.append((f"{name.upper()} {kind} ms", f"{found[f'{kind}_{name}_ms']:.2f}"))
    table = [f"{head:24} {value:>12}" for head, value in shown]
    reasons = {error for error in found["errors"] if error}
    return [*table, *(f"failed: {reason[:200]}" for reason in sorted(reasons)[:3])]


def run_compare(options: argparse.Namespace) -> int:
    """Print both, and the intervals."""
    from quire.bench.compare import compare

    results = [_read(path) for path in (options.first, options.second)]
    found = compare(results[0], results[1])
    rates = [result.get("output_throughput") for result in results]
    if options.json:
        print(
            json.dumps(
                {
                    "output_throughput": rates,
                    "figures": [
                        {"name": one.name, "first": one.first, "second": one.second, "ratio": one.ratio}
                        | {"low": one.low, "high": one.high, "certain": one.is_certain}
                        for one in found
                    ],
                }
            )
        )
        return 0
    print(f"{'':16} {'A':>10} {'B':>10} {'B / A':>7}  of other requests of these two runs, 95 %")
    if all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        first, second = (float(rate) for rate in rates if rate is not None)
        print(f"{'tokens out a s':16} {first:>10.2f} {second:>10.2f} {second / first:>7.3f}  (one number a run)")
    for one in found:
        verdict = "beyond the spread within a run" if one.is_certain else "may be chance"
        interval = f"{one.low:.3f} to {one.high:.3f}, {verdict}"
        print(f"{one.name:16} {one.first:>10.2f} {one.second:>10.2f} {one.ratio:>7.3f}  {interval}")
    return 0


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", field="result") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON", field="result") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} is no result of bench serve", field="result")
    return found
