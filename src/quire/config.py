"""Configuration in two stages: what a user sets (`EngineArgs`, None = decide), and what was resolved.

`EngineArgs` holds vLLM's names. `resolve_*` are pure: they turn arguments and facts (the model's, the
machine's) into frozen values, each decision with its reason. Nothing is changed after that.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal

from quire.errors import ConfigurationError, names_unknown_arguments, unknown_name_message
from quire.outputs import Decision

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_CACHE_DTYPES = {
    **dict(zip(DTYPES, DTYPES, strict=True)),
    **dict.fromkeys(("int8", "int8_per_token_head"), "int8"),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_per_token_head"), "fp8"),
}
"""What is asked for -> the type of the cache."""
BLOCK_SIZES = (8, 16, 32, 64, 128)
POLICIES = ("fcfs", "priority")
DEVICES = ("auto", "cpu", "cuda")
FOUR_BITS: tuple[Literal["int4", "int4_min"], ...] = ("int4", "int4_min")
GROUPED = (*FOUR_BITS, "int8")
"""Of `QUANTIZATIONS`, those whose groups have a size to choose."""
QUANTIZATIONS = ("int8", "int8_w8a8", "int4", "int4_min", "fp8")
GROUP_SIZES = (32, 64, 128)
RELEASES = ("unused", "all", "no")
LOGPROBS_MODES = ("raw_logprobs", "raw_logits")
_PROCESSED_MODES = ("processed_logprobs", "processed_logits")


@names_unknown_arguments("engine argument")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Arguments of `LLM`, `AsyncLLM` and `quire serve`. None means: decide, and say why.

    Raises:
        ConfigurationError: a value of a wrong type or out of range, named.
    """

    model: str | None = None
    """A directory, a GGUF file, a hub id (or `ID:FILE.gguf`), or `smollm2`; None is the embedded model."""
    tokenizer: str | None = None
    """A directory or hub id; None takes the model's own."""
    dtype: str = "auto"
    """Storage of weights, and of the cache unless `kv_cache_dtype` says otherwise: auto (the model's own; bfloat16 of
    GGUF's blocks), bfloat16, float16, float32 (computes exactly)."""
    quantization: str | None = None
    """Quantise the weights while they are loaded: int8 (W8A16), int8_w8a8, int4 (W4A16), int4_min (the same with a
    minimum for each group; CPU), fp8 (CUDA: W8A8; CPU: W8A16). `dtype` is then that of the cache and of weights
    which are not quantised."""
    quantization_group_size: int | None = None
    """Weights of a row that share a scale with int4 or int4_min, or on the CPU int8: 32, 64 or 128; None is 64, and the
    row."""
    kv_cache_dtype: str = "auto"
    """Storage of keys and values: auto (that of the weights), bfloat16, float16, float32, int8 or fp8 (e4m3; also
    `fp8_e4m3`). The last two have a scale for each head and token, take about half of 16 bits, and need the CPU."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None takes the model's limit, or what the cache can hold."""
    max_num_seqs: int = 256
    """Requests that run at once."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step; None: 2048, or more if a single decode step needs it."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory (on the CPU: of this machine's) that weights and cache may take."""
    kv_cache_memory_bytes: int | None = None
    """Size of the cache, instead of the share above; where it is given by name, text such as 8GiB will do."""
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
    batch_invariant: bool = True
    """The bits of an answer do not depend on what runs beside it. False lets a GPU's own library multiply, which picks
    its order of sums by the number of rows; a CPU keeps the promise at no cost."""
    enforce_eager: bool = False
    """No captured graphs of decode steps on a GPU. The CPU has none, so it is honoured by nature there."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads; None takes the physical cores that this process may use."""
    logprobs_mode: str = "raw_logprobs"
    """What `logprobs` and `prompt_logprobs` hold: the model's own log-probabilities (raw_logprobs), or its logits
    (raw_logits); both before masks, penalties and temperature. Ranks are the same."""
    async_scheduling: bool | None = None
    """Plan the next step while one is computed; None: on a GPU. The tokens are the same."""
    core_process: bool = False
    """Compute in a process of its own, which is watched over: when it dies, requests go on in another one."""
    core_niceness: int = 5
    """How far that process gives way to the one that answers people, 0 to 19: on the few processors that they share,
    the threads that compute would keep it waiting at every turn, and a refusal would take as long as a step."""
    hang_timeout: float | None = None
    """Seconds that a step may take before that process counts as hung; None learns it from the steps seen."""
    release_idle_memory: str = "unused"
    """What is given back to the system after a while without a request, on a CPU: memory of the cache that holds
    nothing (unused), the prefix cache too (all), or nothing (no)."""
    tool_call_parser: str | None = None
    """The format in which the model writes calls of tools; None sees it from the chat template."""
    reasoning_parser: str | None = None
    """The format in which it writes reasoning, or none; None sees it from the chat template."""
    verify_cached_blocks: bool = False
    """For debugging: compute the blocks of the prefix cache again in moments without work, and compare them bit for
    bit."""
    record: str | None = None
    """A file to which the scheduler's requests and plans are written, without text or tokens, for `quire replay` and
    `quire simulate`."""

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("kv_cache_dtype", self.kv_cache_dtype, tuple(KV_CACHE_DTYPES))
        _choice("scheduling_policy", self.scheduling_policy, POLICIES)
        _choice("device", self.device, DEVICES)
        _choice("release_idle_memory", self.release_idle_memory, RELEASES)
        if self.logprobs_mode in _PROCESSED_MODES:
            text = (
                f"{self.logprobs_mode!r} is not offered: a kernel cuts the tail while it samples, and tells no values"
            )
            raise _bad("logprobs_mode", f"{text}; {' and '.join(LOGPROBS_MODES)} are")
        _choice("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
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
        timeout = self.hang_timeout
        if timeout is not None and (type(timeout) not in (int, float) or not 0.1 <= timeout <= 86400):
            raise _bad("hang_timeout", f"must be between 0.1 and 86400 seconds, got {timeout!r}")
        if type(self.core_niceness) is not int or not 0 <= self.core_niceness <= 19:
            raise _bad("core_niceness", f"must be a whole number from 0 to 19, got {self.core_niceness!r}")
        for name in (
            *("enable_prefix_caching", "batch_invariant", "enforce_eager", "core_process", "async_scheduling"),
            "verify_cached_blocks",
        ):
            value = getattr(self, name)
            if type(value) is not bool and (name not in _OPTIONAL or value is not None):
                raise _bad(name, "must be true or false")
        if self.verify_cached_blocks and not self.enable_prefix_caching:
            raise _bad("verify_cached_blocks", "needs enable_prefix_caching: without it no block is cached")
        for name in ("model", "tokenizer", "revision", "tool_call_parser", "reasoning_parser", "record"):
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
        size = values.get("kv_cache_memory_bytes")
        if isinstance(size, str):
            values = {**values, "kv_cache_memory_bytes": bytes_of("kv_cache_memory_bytes", size)}
        return cls(**values)


def bytes_of(name: str, text: str) -> int:
    """A size as people write it: `512MiB`, `8G`, `8GiB`, `0.5g`. As vLLM reads them, k, m, g, t are thousands and K, M,
    G, T multiples of 1,024; so are KiB and the like, and kB, MB, GB, TB are thousands.

    Raises:
        ConfigurationError: naming `name`.
    """
    found = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(?:([kmgt])|([KMGT])(?:i[Bb]?)?|([kKMGT])[Bb])?", text.strip()
    )
    if found is not None:
        number, small, binary, large = found.groups()
        power = "kmgt".index((small or binary or large).lower()) + 1 if small or binary or large else 0
        size = Decimal(number) * (1024 if binary else 1000) ** power
        if size == int(size):
            return int(size)
    raise _bad(name, f"must be a whole number of bytes, such as 8GiB, 512MiB or 8G, got {text[:40]!r}")


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
_OPTIONAL = frozenset((*_COUNTS, "async_scheduling")) - {"max_num_seqs", "max_num_queued_reqs", "tensor_parallel_size"}
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
class ModelShare:
    """What one of several models in a server may have of the machine, for `quire.compose.machine_split` to work out."""

    place: int
    """Of this model among them."""
    needs: tuple[int, ...]
    """Bytes that each takes for certain: its weights once packed, and a cache that is asked for by size."""
    stated: tuple[float | None, ...]
    """The share of memory that each states for itself."""
    total: float
    """The share of memory that all may take."""
    free_bytes: int
    """Of this machine, before any is loaded."""
    threads: tuple[int | None, ...]
    """That each asks for."""
    total_threads: int | None = None
    """Of all; None: the machine's cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Where memory goes, in bytes. `quire.runner.memory` fills it in, all but `cache`, by measuring on a GPU and by
    estimating on a CPU; `resolve_cache` gives the cache what is left."""

    device: int
    """All that the device has (on the CPU: this machine, or its container)."""
    used_by_others: int = 0
    """Of other processes, and of the device's own runtime."""
    weights: int
    activations: int = 0
    """What the largest step holds at its peak."""
    sampler: int = 0
    """What choosing tokens needs on top of that."""
    graphs: int = 0
    fragmentation_reserve: int = 0
    """What the allocator may lose between its pieces."""
    cache: int = 0

    @property
    def used(self) -> int:
        """Bytes of all entries together."""
        return sum(value for _, value in self._entries())

    def fits(self, share: float) -> int:
        """What is left of `share` of the device; below 0 if the entries without the cache are more than that."""
        return int(self.device * share) - (self.used - self.cache)

    def __str__(self) -> str:
        entries = ", ".join(f"{name} {mib(value)}" for name, value in self._entries() if value)
        return f"{entries}: {mib(self.used)} of {mib(self.device)}"

    def _entries(self) -> list[tuple[str, int]]:
        return [(item.name, getattr(self, item.name)) for item in fields(self) if item.name != "device"]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the loaded model and the machine are, as far as sizes go."""

    max_position_embeddings: int
    bytes_per_block: int
    device: str
    memory: MemoryBudget
    """Without the cache."""
    free: int | None = None
    """Bytes that this machine, or its container, has free once the weights are loaded; None where a device has its own
    memory, all of which is there for the asking."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Resolved sizes of scheduler and cache."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    soft_block_limit: int
    """Blocks that may have memory before the prefix cache evicts: see `quire.core.block_pool`."""
    memory: MemoryBudget
    decisions: tuple[Decision, ...]


def resolve_batched_tokens(args: EngineArgs) -> int:
    """Tokens computed in one step, at most."""
    return args.max_num_batched_tokens or max(2048, args.max_num_seqs)


def resolve_model_len(args: EngineArgs, max_position_embeddings: int) -> int:
    """The longest sequence that is allowed before the cache is sized.

    Raises:
        ConfigurationError: it is more than the model's positions.
    """
    if args.max_model_len is None:
        return max_position_embeddings
    if args.max_model_len > max_position_embeddings:
        raise _bad("max_model_len", f"is {args.max_model_len}; the model has {max_position_embeddings} positions")
    return args.max_model_len


def resolve_cache(args: EngineArgs, facts: ModelSizes) -> CachePlan:
    """Size the cache: an explicit number of blocks, else explicit bytes, else what the budget leaves of the memory
    share; on the CPU no more than `max_num_seqs` sequences of full length need, nor than half of what is free.

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
                f"is {wanted_len}, which needs {mib(need)} of cache for one sequence; "
                f"{mib(num_blocks * facts.bytes_per_block)} fit ({reason}); "
                + what_would_fit(num_blocks * facts.bytes_per_block, facts.bytes_per_block / args.block_size, 0),
            )
        max_model_len = held
        decisions.append(
            Decision("max_model_len", str(held), f"all that {num_blocks} blocks hold; the model has {wanted_len}")
        )
    max_tokens = resolve_batched_tokens(args)
    if args.max_num_batched_tokens is None:
        decisions.append(Decision("max_num_batched_tokens", str(max_tokens), "the default: one chunk of prompt a step"))
    budget = replace(facts.memory, cache=num_blocks * facts.bytes_per_block)
    if facts.device != "cpu" and budget.used > budget.device:
        raise _bad(reason if reason in _SIZES else "gpu_memory_utilization", f"does not fit the device: {budget}")
    # The memory of a host is not taken before it is written.
    size, up_to = f"{num_blocks} x {args.block_size} tokens", "" if facts.free is None else "up to "
    room = f"reserved {up_to}{mib(budget.cache)}" if up_to else mib(budget.cache)
    decisions.append(Decision("num_blocks", f"{size}, {room}", reason))
    soft_limit, decision = _soft_limit(args, facts, num_blocks, max_model_len)
    decisions += [decision, Decision("memory", up_to + mib(budget.used), str(budget))]
    return CachePlan(
        max_model_len, args.max_num_seqs, max_tokens, args.block_size, num_blocks, soft_limit, budget, tuple(decisions)
    )


def _soft_limit(args: EngineArgs, facts: ModelSizes, num_blocks: int, max_model_len: int) -> tuple[int, Decision]:
    """Blocks that may have memory for the sake of the prefix cache alone."""
    if not args.enable_prefix_caching:
        return num_blocks, Decision("prefix_cache", "off", "enable_prefix_caching")
    if facts.free is None or args.kv_cache_memory_bytes is not None or args.num_gpu_blocks_override is not None:
        why = "a device's memory is reserved as a whole" if facts.free is None else "the size of the cache was given"
        return num_blocks, Decision("prefix_cache", mib(num_blocks * facts.bytes_per_block), why)
    longest = math.ceil(max_model_len / args.block_size)
    limit = min(num_blocks, max(longest, facts.memory.weights // facts.bytes_per_block))
    why = "as much as the weights, or the longest sequence if that is more; kv_cache_memory_bytes keeps all of it"
    return limit, Decision("prefix_cache", f"up to {mib(limit * facts.bytes_per_block)}", why)


_SIZES = ("num_gpu_blocks_override", "kv_cache_memory_bytes")


def _num_blocks(args: EngineArgs, facts: ModelSizes, max_model_len: int) -> tuple[int, str]:
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override, "num_gpu_blocks_override"
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes // facts.bytes_per_block, "kv_cache_memory_bytes"
    budget, share = facts.memory, args.gpu_memory_utilization
    left = budget.fits(share)
    if left < 0:
        raise _bad(
            "gpu_memory_utilization",
            f"{share:g} of {mib(budget.device)} is {mib(int(budget.device * share))}; "
            f"without any cache there is {budget}; "
            + what_would_fit(left, facts.bytes_per_block / args.block_size, budget.weights),
        )
    fits = left // facts.bytes_per_block
    reason = f"gpu_memory_utilization={share:g} of {mib(budget.device)}"
    if facts.free is None:
        return fits, reason
    longest = math.ceil(max_model_len / args.block_size)
    half = max(facts.free // 2 // facts.bytes_per_block, 0 if args.max_model_len is None else longest)
    if half < fits:
        fits, reason = half, f"half of the {mib(facts.free)} that are free"
    if args.max_num_seqs * longest < fits:
        text = f"what max_num_seqs={args.max_num_seqs} sequences of {max_model_len} tokens need"
        return args.max_num_seqs * longest, text
    return fits, reason


def what_would_fit(left: int, bytes_per_token: float, weight_bytes: int) -> str:
    """What to ask for, where weights and one sequence do not fit.

    Args:
        left: bytes beside the weights; below 0 what they exceed the memory by.
        weight_bytes: of all weights, which quantisation would lessen.
    """
    tokens = int(left // bytes_per_token)
    if tokens > 0:
        return f"--max-model-len {tokens} would; --kv-cache-dtype int8 holds about twice as many"
    return f"the weights alone exceed it by {max(0, -left) / 1e9:,.1f} GB; {_smaller(-left, weight_bytes)}"


def _smaller(excess: int, weight_bytes: int) -> str:
    """The mildest quantisation that saves so many bytes of weights in 16 bits."""
    for name, share in (("int8", 0.5), ("int4", 0.28)):
        if weight_bytes * (1 - share) > excess:
            return f"--quantization {name} would leave {(weight_bytes * (1 - share) - excess) / 1e9:,.1f} GB"
    return "no quantisation makes it fit"


def mib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**20:,.0f} MiB"
