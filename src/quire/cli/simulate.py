"""`quire simulate`: recorded requests, or made-up ones, under other settings; no model is needed."""

import argparse
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quire.config import POLICIES
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.observe.replay import Asked, Session
    from quire.observe.simulate import Outcome
    from quire.observe.step_cost import StepCost

EXAMPLES = """examples:
  quire simulate night.jsonl --max-num-seqs 32
  quire simulate night.jsonl --speed 2 --ttft 0.5 --tpot 0.05
  quire simulate --requests 500 --rate 2 --all-memory

The requests of a recording come when they came and become as long as they became. The scheduler is the real one; the
time of a step is a line fitted to the steps of the recording. Without a recording, requests are made up (--lengths,
--rate), and a step takes what one of OPT-13B takes on an A100 of 40 GB; --step-cost says otherwise."""
PAGED = "paged"
MEMORIES = (PAGED, "reserve-max", "reserve-pow2", "reserve-oracle")
OPT_13B_A100 = (0.0165, 0.00017, 0.0, 5.3e-7)
"""26 GB of weights at 1.555 TB/s; 2 x 13 GFLOP a token at half of 312 TFLOP/s; 0.82 MB of keys and values a token."""
OPT_13B_BLOCKS = 920
"""Of 16 tokens, in the 12 GB that the weights leave."""
COLUMNS = {
    "output_tokens_per_s": ("tok/s", 1, ".1f"),
    "ttft_p50_s": ("TTFT p50 ms", 1e3, ".1f"),
    "ttft_p99_s": ("p99 ms", 1e3, ".1f"),
    "tpot_p50_s": ("TPOT p50 ms", 1e3, ".2f"),
    "tpot_p99_s": ("p99 ms", 1e3, ".2f"),
    "mean_running": ("running", 1, ".1f"),
    "preemptions": ("preempted", 1, "d"),
    "refused": ("refused", 1, "d"),
    "goodput_requests_per_s": ("good req/s", 1, ".2f"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("recording", metavar="FILE", nargs="?", help="of --record; without it, requests are made up")
    flag = parser.add_argument_group("settings; left out: those of the recording").add_argument
    flag("--max-num-seqs", type=int, metavar="N", help="requests that run at once")
    flag("--max-num-batched-tokens", type=int, metavar="N", help="tokens computed in one step")
    flag("--max-model-len", type=int, metavar="N", help="longest prompt plus output, in tokens")
    flag("--num-gpu-blocks-override", type=int, metavar="N", help="number of cache blocks")
    flag("--scheduling-policy", choices=POLICIES, help=" or ".join(POLICIES))
    flag("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="reuse prompts that begin alike")
    flag = parser.add_argument_group("memory and batches of other engines").add_argument
    text = "how a request takes memory: in blocks, or in one piece for the longest sequence, a power of two, its length"
    flag("--memory", choices=MEMORIES, default=PAGED, help=text)
    text = "static: a batch waits for its longest request; needs a --memory that reserves"
    flag("--batching", choices=("continuous", "static"), default="continuous", help=text)
    flag("--all-memory", action="store_true", help="all of these side by side")
    flag = parser.add_argument_group("requests and time").add_argument
    flag("--requests", type=int, default=200, metavar="N", help="to make up (default: 200)")
    flag(
        "--rate", type=float, default=1.0, metavar="R", help="made-up requests a second (default: 1); inf: all at once"
    )
    flag("--lengths", choices=("sharegpt", "alpaca"), default="sharegpt", help="of made-up requests, like those of")
    flag("--seed", type=int, default=0, help="of made-up requests")
    flag("--speed", type=float, default=1.0, metavar="X", help="let requests come so many times as fast")
    text = "seconds a step, a token, a row that samples, and a token times what it looks at"
    flag("--step-cost", type=float, nargs=4, metavar="S", help=text)
    flag("--ttft", type=float, metavar="S", help="a first token later than this is not good (goodput)")
    flag("--tpot", type=float, metavar="S", help="nor is an answer with more seconds a token")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Simulate and print."""
    _check(options)
    sessions, requests, cost, error = _given(options)
    if not requests:
        raise ConfigurationError("the recording holds no request", field="recording")
    found: dict[str, Outcome] = {}
    if options.recording is not None:
        from quire.observe.simulate import recorded, simulate

        if options.speed == 1.0:
            found["recorded"] = recorded(sessions)
        found["as recorded"] = simulate(sessions[0], requests, cost)
    for name, outcome in _simulated(options, sessions[0], requests, cost):
        found[name] = outcome
    bounds = (options.ttft, options.tpot)
    if options.json:
        shown = {name: {**one.numbers(*bounds), "memory": _parts(one)} for name, one in found.items()}
        coefficients = {name: getattr(cost, name) for name in cost.__slots__}
        print(json.dumps({"step_cost": {**coefficients, "median_error": error}, "outcomes": shown}))
        return 0
    print(_head(requests, cost, error))
    _table(found, bounds)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not options.requests >= 1 or options.requests > 100_000:
        raise ConfigurationError(f"requests must be between 1 and 100000, got {options.requests}", field="requests")
    for name in ("rate", "speed"):
        if not getattr(options, name) > 0:
            raise ConfigurationError(f"{name} must be above 0, got {getattr(options, name)}", field=name)
    if options.step_cost is not None and not (
        min(options.step_cost) >= 0 and sum(options.step_cost[:2]) > 0 and math.isfinite(sum(options.step_cost))
    ):
        raise ConfigurationError(
            "step_cost must be four numbers of seconds, a step or a token above 0", field="step_cost"
        )
    if options.batching == "static" and options.memory == PAGED:
        raise ConfigurationError(
            "batching static needs --memory reserve-max, reserve-pow2 or reserve-oracle", field="batching"
        )


def _given(options: argparse.Namespace) -> "tuple[list[Session], list[Asked], StepCost, float | None]":
    """Settings, requests, the cost of steps, and the median error of its fit."""
    from quire.observe.step_cost import StepCost, fit

    if options.recording is not None:
        from quire.observe.replay import read
        from quire.observe.simulate import arrivals

        sessions = read(options.recording)
        requests = arrivals(sessions)
        cost, error = fit(sessions) if options.step_cost is None else (StepCost(*options.step_cost), None)
    else:
        from quire.core.limits import SchedulerConfig
        from quire.observe.arrivals import NAMED, made_up
        from quire.observe.replay import Session

        longest = options.max_model_len or 2048
        config = SchedulerConfig(256, 2560, longest, 16, max(OPT_13B_BLOCKS, -(-longest // 16)))
        sessions, error = [Session(config, "fcfs", True, 0, 0.0)], None
        requests = made_up(NAMED[options.lengths], options.requests, options.rate, longest, options.seed)
        cost = StepCost(*(options.step_cost or OPT_13B_A100))
    first_s = requests[0].arrival_s if requests else 0.0
    requests = [replace(one, arrival_s=first_s + (one.arrival_s - first_s) / options.speed) for one in requests]
    return sessions, requests, cost, error


def _simulated(options: argparse.Namespace, session: "Session", requests: Any, cost: Any) -> Any:
    """Names and outcomes of what was asked for."""
    from quire.observe.reservations import simulate_reserved
    from quire.observe.simulate import simulate

    fields = {
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_model_len": options.max_model_len,
        "num_blocks": options.num_gpu_blocks_override,
        "policy": options.scheduling_policy,
        "prefix_caching": options.enable_prefix_caching,
    }
    changes = {name: value for name, value in fields.items() if value is not None}
    sizes = {name: value for name, value in changes.items() if name not in ("policy", "prefix_caching")}
    schemes = [(PAGED, "continuous")] if options.memory == PAGED else [(options.memory, options.batching)]
    if options.all_memory:
        reserved = [(memory, batching) for batching in ("continuous", "static") for memory in MEMORIES[1:]]
        schemes = [(PAGED, "continuous"), *reserved]
    for memory, batching in schemes:
        if memory == PAGED:
            if options.recording is None or changes or options.all_memory:
                yield ("changed" if changes else PAGED), simulate(session, requests, cost, **changes)
        else:
            config = replace(session.config, **sizes)
            yield f"{memory}, {batching}", simulate_reserved(config, requests, cost, memory, batching)


def _parts(outcome: "Outcome") -> dict[str, float] | None:
    return None if outcome.memory is None else outcome.memory.parts


def _head(requests: Any, cost: Any, error: float | None) -> str:
    spent_s = requests[-1].arrival_s - requests[0].arrival_s
    prompt, output = (sum(getattr(one, name) for one in requests) / len(requests) for name in ("prompt", "num_output"))
    fit = "" if error is None else f" (fitted: half of the steps are within {error:.0%})"
    return (
        f"{len(requests)} requests in {spent_s:.1f} s, {prompt:.0f} tokens in and {output:.0f} out on average\n"
        f"a step: {cost.fixed * 1e3:.3f} ms, {cost.token * 1e6:.1f} us a token, {cost.row * 1e6:.1f} us a row that "
        f"samples, {cost.context * 1e9:.2f} ns a token and token that it looks at{fit}"
    )


def _table(found: "dict[str, Outcome]", bounds: tuple[float | None, float | None]) -> None:
    numbers = {name: outcome.numbers(*bounds) for name, outcome in found.items()}
    columns = {key: column for key, column in COLUMNS.items() if any(key in one for one in numbers.values())}
    width = max(map(len, found))
    heads = "  ".join(f"{head:>{max(len(head), 9)}}" for head, _, _ in columns.values())
    print(f"{'':{width}}  {heads}  {'cache used, to come, wasted':>27}")
    for name, one in numbers.items():
        cells = []
        for key, (head, factor, kind) in columns.items():
            text = format(int(one[key]) if kind == "d" else one[key] * factor, kind) if key in one else "-"
            cells.append(f"{text:>{max(len(head), 9)}}")
        parts = _parts(found[name])
        shares = "-" if parts is None else ", ".join(f"{parts[key]:.0%}" for key in ("used", "reserved", "wasted"))
        print(f"{name:{width}}  {'  '.join(cells)}  {shares:>27}")
