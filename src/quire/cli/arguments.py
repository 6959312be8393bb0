"""Flags. Those of the engine and of sampling are made from `EngineArgs` and `SamplingParams`, once for all verbs.

Hyphen and underscore are both accepted. Names of other engines are aliases where they mean the same; names that vLLM
removed, or that switch on what Quire always does, are dropped with one line that says so.
"""

import argparse
import difflib
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from quire.cli.model_path import is_model
from quire.config import (
    BLOCK_SIZES,
    DEVICES,
    DTYPES,
    GROUP_SIZES,
    KV_CACHE_DTYPES,
    LOGPROBS_MODES,
    POLICIES,
    QUANTIZATIONS,
    RELEASES,
    EngineArgs,
    bytes_of,
)
from quire.errors import ConfigurationError
from quire.sampling_params import SamplingParams

EMBEDDED_NAME = "quire-demo"
ENGINE_HELP = {
    "model": f"directory, GGUF file, hub id (or ID:FILE.gguf), smollm2; without it, the embedded one, {EMBEDDED_NAME}",
    "tokenizer": "a directory or hub id; the model's own",
    "dtype": f"weights, and the cache where it has no type of its own: {', '.join(DTYPES)}; float32 computes exactly",
    "quantization": f"round the weights while loading: {', '.join(QUANTIZATIONS)}; left out: not at all",
    "quantization_group_size": f"weights that share a scale (int4, int4_min, int8): {', '.join(map(str, GROUP_SIZES))}",
    "kv_cache_dtype": f"keys and values: {', '.join(KV_CACHE_DTYPES)}; 8 bits take about half of 16 (CPU)",
    "max_model_len": "longest prompt plus output, in tokens (32k and 32K are understood); auto takes the model's",
    "max_num_seqs": "requests that run at once",
    "max_num_batched_tokens": "tokens computed in one step",
    "gpu_memory_utilization": "share of the device's memory (on a CPU: of the machine's) for weights and cache",
    "kv_cache_memory_bytes": "size of the cache, instead of the share: 8GiB, 512MiB, 8G",
    "num_gpu_blocks_override": "number of cache blocks, whatever fits",
    "block_size": f"tokens in a block: {', '.join(map(str, BLOCK_SIZES))}",
    "enable_prefix_caching": "reuse the cache of prompts that begin alike",
    "scheduling_policy": " or ".join(POLICIES),
    "max_num_queued_reqs": "requests that may wait (serve); more are refused with a time to come back",
    "max_num_queued_tokens": "their prompt tokens",
    "seed": "seeds requests that bring none",
    "revision": "branch, tag or commit on the hub",
    "tensor_parallel_size": "devices that share one model",
    "batch_invariant": "answers do not depend on what runs beside them; on a GPU this may cost some speed",
    "enforce_eager": "no captured graphs",
    "device": ", ".join(DEVICES),
    "threads": "CPU threads; the physical cores that this process may use",
    "logprobs_mode": f"what logprobs hold: {', '.join(LOGPROBS_MODES)}; the model's own, before masks and temperature",
    "async_scheduling": "plan the next step while one is computed; on a GPU by default",
    "core_process": "compute in a process of its own, replaced when it dies; serve does so by default",
    "core_niceness": "how far that process gives way to the one that answers people, from 0 to 19",
    "hang_timeout": "seconds that a step may take before that process is replaced; learned from steps like it",
    "tool_call_parser": "how the model writes calls of tools (docs/guide/tools.md); seen from the chat template",
    "reasoning_parser": "how it writes reasoning, or none; seen from the chat template",
    "release_idle_memory": f"given back when idle, on a CPU: {', '.join(RELEASES)} (memory without content, "
    "the prefix cache too, nothing)",
    "record": "a file for what the scheduler is asked and decides, without text or tokens (quire replay)",
    "verify_cached_blocks": "for debugging: when idle, compute cached blocks again and compare them bit for bit",
}
SAMPLING_HELP = {
    "n": "answers to each prompt",
    "temperature": "0 takes the most probable token",
    "top_p": "keep the most probable tokens up to this mass",
    "top_k": "keep this many tokens; 0 keeps all",
    "min_p": "drop tokens less probable than this share of the best one's",
    "typical_p": "keep the tokens whose surprise is nearest to the expected one, up to this mass",
    "presence_penalty": "against tokens that occurred",
    "frequency_penalty": "against tokens, by how often they occurred",
    "repetition_penalty": "above 1 against tokens of prompt and answer",
    "max_tokens": "tokens to generate at most; until the end or the context's end",
    "min_tokens": "no end before this many tokens",
    "ignore_eos": "go on after the end of the answer",
}
_OTHER_NAMES = {
    "--model": "--model-path --model-id --model-dir",
    "--max-model-len": "--context-length --max-seq-len --max-total-tokens --ctx-size -c --num-ctx --session-len",
    "--gpu-memory-utilization": "--mem-fraction-static --free-gpu-memory-fraction --cuda-memory-fraction "
    "--cache-max-entry-count",
    "--max-num-seqs": "--max-running-requests --max-batch-size -np --parallel",
    "--max-num-batched-tokens": "--chunked-prefill-size --max-num-tokens --max-batch-prefill-tokens",
    "--block-size": "--page-size --tokens-per-block --cb-block-size",
    "--tensor-parallel-size": "-tp --tp-size --tp --num-shard",
    "--quantization": "-q --quantize",
    "--max-num-queued-reqs": "--max-queued-requests --max-concurrent-requests",
    "--enforce-eager": "--disable-cuda-graph",
    "--no-async-scheduling": "--disable-overlap-schedule --disable-overlap-scheduler",
    "--no-enable-prefix-caching": "--disable-radix-cache",
    "--scheduling-policy": "--schedule-policy",
    "--max-tokens": "--max-completion-tokens --max-new-tokens --num-predict --n-predict --max-output-tokens",
    "--tool-call-parser": "--tool-parser",
    "--seed": "--sampling-seed --random-seed",
}
ALIASES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
"""Other engines' names. `-c` and `-np` are llama.cpp's."""
OTHER_MEANING = frozenset({"--mem-fraction-static", "--free-gpu-memory-fraction", "--cache-max-entry-count"})
"""Aliases whose share is of something a little different there."""
NO_EFFECT = {
    **dict.fromkeys(("--swap-space", "--num-lookahead-slots", "--num-scheduler-steps", "--preemption-mode"), True),
    **dict.fromkeys(("--max-num-partial-prefills",), True),
    **dict.fromkeys(("--use-v2-block-manager", "--disable-log-requests", "--enable-chunked-prefill"), False),
    **dict.fromkeys(("--enable-auto-tool-choice",), False),
}
"""Names without effect here -> whether a value follows."""


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag when it meets an unknown one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, with a better word for what is left over."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest[0]))
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A verb refuses what it does not know itself: it knows its own flags. Words may stand between flags."""
        options, rest = super().parse_known_args(args, namespace)
        rest = [item for item in rest if item != "--"]  # left over where words stood before it too
        words = next((one.dest for one in self._actions if one.nargs == "*" and not one.option_strings), None)
        if words is not None and not any(item.startswith("-") for item in rest):
            getattr(options, words).extend(rest)
            rest = []
        if rest and self._subparsers is None:
            self.error(self._unknown(rest[0]))
        return options, rest

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def _unknown(self, given: str) -> str:
        if not given.startswith("-"):
            return f"unexpected argument {given!r}"
        name = given.partition("=")[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        likeness = [difflib.SequenceMatcher(None, one, name).ratio() for one in nearest]
        best = sorted(repr(one) for one, like in zip(nearest, likeness, strict=True) if like == likeness[0])
        return f"unknown flag {name!r}" + (f"; did you mean {' or '.join(best)}?" if best else "")


def canonical(arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The same command line under canonical names. What follows `--` is left alone."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        if item == "--":
            return [*result, item, *rest]
        if not item.startswith("-") or item == "-" or _is_number(item):
            result.append(item)
            continue
        name, equals, value = item.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name in NO_EFFECT:
            if NO_EFFECT[name] and not equals and rest:
                rest.pop(0)
            say(f"quire: {name} has no effect here: leave it out")
            continue
        if name in OTHER_MEANING:
            say(f"quire: {name} is read as {ALIASES[name]}, a share of all of the device's memory")
        result.append(ALIASES.get(name, name) + equals + value)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def add_engine(
    parser: argparse.ArgumentParser,
    *,
    positional_model: bool = False,
    several: bool = False,
    names: Iterable[str] = ENGINE_HELP,
) -> None:
    """Every field of `EngineArgs` as a flag, or those of `names`. Left out, a flag is absent from the namespace.

    Args:
        several: more than one model may be named.
    """
    group = parser.add_argument_group("engine")
    if positional_model:
        many = "*" if several else "?"
        parser.add_argument("positional_model", nargs=many, metavar="MODEL", help=ENGINE_HELP["model"])
    _add_fields(group, EngineArgs, {name: ENGINE_HELP[name] for name in names})


def add_sampling(parser: argparse.ArgumentParser, *, without: Iterable[str] = ()) -> None:
    """The sampling flags of a person at a terminal; the model's own settings where they are left out."""
    group = parser.add_argument_group("sampling (left out: the model's own settings)")
    _add_fields(group, SamplingParams, {k: v for k, v in SAMPLING_HELP.items() if k not in without})
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="text that ends the answer; may be repeated",
    )


def _add_fields(group: Any, owner: type, helps: dict[str, str]) -> None:
    hints = get_type_hints(owner)
    defaults = {item.name: item.default for item in fields(owner)}
    for name, text in helps.items():
        flag, kind = "--" + name.replace("_", "-"), _plain_type(hints[name])
        default = defaults[name]
        shown = text if default in (None, MISSING, False) or owner is SamplingParams else f"{text} (default: {default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": shown.replace("%", "%%")}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind is int:
            group.add_argument(flag, type=_KINDS.get(name, _count), metavar="N", **common)
        elif kind is float:
            group.add_argument(flag, type=float, metavar="X", **common)
        else:
            group.add_argument(flag, metavar="NAME", **common)


def _plain_type(hint: Any) -> type:
    if get_origin(hint) in (Union, types.UnionType):
        return _plain_type(next(item for item in get_args(hint) if item is not type(None)))
    plain: type = hint
    return plain


def _count(text: str) -> int:
    """A whole number; k, m, g are thousands, K, M, G multiples of 1,024, as vLLM reads them."""
    scales = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        if text[-1:] in scales:
            number = float(text[:-1]) * scales[text[-1]]
            if number == int(number):
                return int(number)
        return int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error


def _length(text: str) -> int | None:
    return None if text in ("auto", "-1") else _count(text)


def _size(text: str) -> int:
    try:
        return bytes_of("it", text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(error.message) from error


_count.__name__ = _length.__name__ = "whole number"
_KINDS: dict[str, Callable[[str], int | None]] = {"max_model_len": _length, "kv_cache_memory_bytes": _size}


def engine_values(options: argparse.Namespace) -> dict[str, Any]:
    """The engine arguments that were given."""
    values = {name: getattr(options, name) for name in ENGINE_HELP if hasattr(options, name)}
    positional = getattr(options, "positional_model", None)
    if isinstance(positional, list):  # of several, each has arguments of its own: `quire.cli.serve_models`
        positional = positional[0] if len(positional) == 1 else None
    if positional is not None and values.setdefault("model", positional) != positional:
        text = f"two models are named: {positional[:200]} and --model {values['model'][:200]}"
        raise ConfigurationError(text, field="model")
    if "model" in values and model_argument(values["model"]) is None:
        del values["model"]
    return values


def model_argument(text: str) -> str | None:
    """A model as `EngineArgs` takes it: None for the embedded one, by its name, unless a model has that path."""
    return None if text == EMBEDDED_NAME and not is_model(EMBEDDED_NAME) else text


def sampling_values(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given."""
    return {
        name: getattr(options, name)
        for name in (*SAMPLING_HELP, "stop", "structured_outputs")
        if hasattr(options, name)
    }
