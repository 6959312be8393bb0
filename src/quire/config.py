"""Configuration in two stages: what a user asks (`EngineArgs`, None = decide), and what was resolved.

`EngineArgs` holds vLLM's names. `resolve_*` are pure: they turn arguments and facts (the model's, the
machine's) into frozen values, each decision with its reason. Nothing is changed after that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quire.errors import ConfigurationError, unknown_name_message
from quire.outputs import Decision

DTYPES = ("auto", "bfloat16", "float16", "float32")
BLOCK_SIZES = (8, 16, 32, 64, 128)
POLICIES = ("fcfs", "priority")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("int8", "int8_w8a8", "int4")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Arguments of `LLM`, `AsyncLLM` and `quire serve`. None means: decide, and say why.

    Raises:
        ConfigurationError: a value of a wrong type or out of range, named.
    """

    model: str | None = None
    """A directory, or the id of a model on the hub; None is the embedded model."""
    tokenizer: str | None = None
    """A directory or hub id; None takes the model's own."""
    dtype: str = "auto"
    """Storage of weights and cache: auto (the checkpoint's own), bfloat16, float16, float32 (computes exactly)."""
    quantization: str | None = None
    """Round the weights while they are loaded: int8, int8_w8a8 (inputs too), int4. `dtype` is then that of the cache
    and of weights which are not rounded."""
    quantization_group_size: int | None = None
    """Weights of a row that share a scale with int4: 32, 64 or 128; None is 64."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None takes the model's limit, or what the cache can hold."""
    max_num_seqs: int = 256
    """Requests that run at once."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step; None: 2048, or more if a single decode step needs it."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory (on the CPU: of this machine's) that weights and cache may take."""
    kv_cache_memory_bytes: int | None = None
    """Size of the cache, instead of the share above."""
    num_gpu_blocks_override: int | None = None
    """Number of cache blocks, whatever fits."""
    block_size: int = 16
    """Tokens in a block."""
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    max_num_queued_reqs: int = 1024
    """Sequences that may wait for their first step, beyond those for which there is a row; then requests are refused
    (not those of `LLM`, which are all there from the start)."""
    max_num_queued_tokens: int | None = None
    """Prompt tokens that may wait; None: 2^20, or eight of the longest prompts."""
    seed: int = 0
    """Seeds requests that bring none."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    """No captured graphs: the CPU has none, so it is honoured by nature there."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads; None takes the physical cores that this process may use."""
    core_process: bool = False
    """Compute in a process of its own, which is watched over: when it dies, requests go on in another one."""

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("scheduling_policy", self.scheduling_policy, POLICIES)
        _choice("device", self.device, DEVICES)
        if self.quantization is not None:
            _choice("quantization", self.quantization, QUANTIZATIONS)
        if self.quantization_group_size is not None:
            _choice("quantization_group_size", self.quantization_group_size, GROUP_SIZES)
        if self.block_size not in BLOCK_SIZES:
            raise _bad("block_size", f"must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise _bad("gpu_memory_utilization", f"must be in (0, 1], got {share!r}")
        for name in _COUNTS:
            _count(name, getattr(self, name), optional=name in _OPTIONAL)
        for name in ("enable_prefix_caching", "enforce_eager", "core_process"):
            if type(getattr(self, name)) is not bool:
                raise _bad(name, "must be true or false")
        for name in ("model", "tokenizer", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise _bad(name, "must be a string that is not empty")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise _bad("seed", f"must be between 0 and 2^63 - 1, got {self.seed!r}")
        if self.tensor_parallel_size != 1:
            raise _bad("tensor_parallel_size", f"must be 1 in this version, got {self.tensor_parallel_size}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "EngineArgs":
        """Build from names that came from outside.

        Raises:
            ConfigurationError: an unknown name (with the nearest known one) or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigurationError(unknown_name_message("engine argument", name, known), field=name)
        return cls(**values)


_COUNTS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "tensor_parallel_size",
    "threads",
)
_OPTIONAL = frozenset(_COUNTS) - {"max_num_seqs", "max_num_queued_reqs", "tensor_parallel_size"}
_LARGEST = {"max_num_seqs": 4096, "max_num_batched_tokens": 2**20, "threads": 1024, "max_model_len": 2**24}


def _bad(name: str, text: str) -> ConfigurationError:
    return ConfigurationError(f"{name} {text}", field=name)


def _choice(name: str, value: Any, known: tuple[str, ...] | tuple[int, ...]) -> None:
    if isinstance(value, bool) or value not in known:
        raise _bad(name, f"must be one of {', '.join(map(str, known))}, got {value!r}")


def _count(name: str, value: Any, *, optional: bool) -> None:
    if value is None and optional:
        return
    smallest, largest = 0 if name == "max_num_queued_reqs" else 1, _LARGEST.get(name, 2**62)
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise _bad(name, f"must be a whole number between {smallest} and {largest}, got {value!r}")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the loaded model and the machine are, as far as sizes go."""

    max_position_embeddings: int
    weight_bytes: int
    bytes_per_block: int
    device_memory_bytes: int
    device: str


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Resolved sizes of scheduler and cache."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    cache_bytes: int
    decisions: tuple[Decision, ...]


def resolve_model_len(args: EngineArgs, max_position_embeddings: int) -> int:
    """The longest sequence that is allowed before the cache is sized.

    Raises:
        ConfigurationError: more was asked than the model's positions.
    """
    if args.max_model_len is None:
        return max_position_embeddings
    if args.max_model_len > max_position_embeddings:
        raise _bad("max_model_len", f"is {args.max_model_len}; the model has {max_position_embeddings} positions")
    return args.max_model_len


def resolve_cache(args: EngineArgs, facts: ModelFacts) -> CachePlan:
    """Size the cache: an explicit number of blocks, else explicit bytes, else the memory share; on the CPU no more
    than `max_num_seqs` sequences of full length need.

    Raises:
        ConfigurationError: weights or one sequence of `max_model_len` do not fit, with the numbers.
    """
    wanted_len = resolve_model_len(args, facts.max_position_embeddings)
    num_blocks, reason = _num_blocks(args, facts, wanted_len)
    max_model_len, decisions = wanted_len, []
    if num_blocks * args.block_size < wanted_len:
        held = num_blocks * args.block_size
        if args.max_model_len is not None or held < args.block_size:
            need = math.ceil(wanted_len / args.block_size) * facts.bytes_per_block
            raise _bad(
                "max_model_len",
                f"is {wanted_len}, which needs {_mib(need)} of cache for one sequence; "
                f"{_mib(num_blocks * facts.bytes_per_block)} fit ({reason})",
            )
        max_model_len = held
        decisions.append(
            Decision("max_model_len", str(held), f"all that {num_blocks} blocks hold; the model has {wanted_len}")
        )
    budget = args.max_num_batched_tokens or max(2048, args.max_num_seqs)
    if args.max_num_batched_tokens is None:
        decisions.append(Decision("max_num_batched_tokens", str(budget), "the default: one chunk of prompt a step"))
    cache_bytes = num_blocks * facts.bytes_per_block
    decisions.append(Decision("num_blocks", f"{num_blocks} x {args.block_size} tokens, {_mib(cache_bytes)}", reason))
    return CachePlan(
        max_model_len, args.max_num_seqs, budget, args.block_size, num_blocks, cache_bytes, tuple(decisions)
    )


def _num_blocks(args: EngineArgs, facts: ModelFacts, max_model_len: int) -> tuple[int, str]:
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override, "num_gpu_blocks_override"
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes // facts.bytes_per_block, "kv_cache_memory_bytes"
    budget = int(facts.device_memory_bytes * args.gpu_memory_utilization)
    if facts.weight_bytes > budget:
        raise _bad(
            "gpu_memory_utilization",
            f"{args.gpu_memory_utilization:g} of {_mib(facts.device_memory_bytes)} is {_mib(budget)}; "
            f"the weights alone take {_mib(facts.weight_bytes)}",
        )
    fits = (budget - facts.weight_bytes) // facts.bytes_per_block
    useful = args.max_num_seqs * math.ceil(max_model_len / args.block_size)
    if facts.device == "cpu" and useful < fits:
        return useful, f"what max_num_seqs={args.max_num_seqs} sequences of {max_model_len} tokens need"
    return (
        fits,
        f"gpu_memory_utilization={args.gpu_memory_utilization:g} of {_mib(facts.device_memory_bytes)}",
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
