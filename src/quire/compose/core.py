"""The side that computes, from a model's files: a directory, or a GGUF file.

::

    files -> operations -> model -> sizes -> runner -> executor -> scheduler -> core
"""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from quire.compose.engine_dir import as_built
from quire.compose.machine_split import free_part, memory_part, on_own_cores, share_decision
from quire.compose.structured import grammar_compiler
from quire.config import (
    FOUR_BITS,
    CachePlan,
    EngineArgs,
    ModelShare,
    ModelSizes,
    resolve_batched_tokens,
    resolve_cache,
    resolve_model_len,
)
from quire.core.admission import AdmissionRule
from quire.core.engine_core import EngineCore, Executor, OverlappingCore
from quire.core.limits import SchedulerConfig
from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.scheduler import Scheduler
from quire.engine.channel import CoreInfo, ModelDescription
from quire.engine.verify_blocks import CachedBlockVerifier
from quire.errors import ConfigurationError
from quire.executor.local import LocalExecutor
from quire.models.model import Model
from quire.models.parameters import decoder_parameters
from quire.models.rope import takes_long_factors
from quire.models.spec import DecoderSpec, LongRopeScaling
from quire.ops.select import select_ops
from quire.ops.types import Device, Provider
from quire.outputs import Decision, Labels
from quire.quant.select import scheme_for, select_cache_dtype, select_scheme
from quire.quant.types import Scheme, bits_per_weight
from quire.runner.host_memory import free_memory_bytes, host_memory_bytes
from quire.runner.memory import StepShape, check_budget, make_budget
from quire.runner.model_runner import ModelRunner
from quire.runner.teacher_forcing import TeacherForcing
from quire.sampling.features import SamplingFeature
from quire.sampling.features.grammar import GrammarMasks, Grammars
from quire.sampling.features.masks import LogitMasks
from quire.sampling.features.penalties import Penalties
from quire.sampling.features.typical import Typical
from quire.weights.formats.gguf_names import is_gguf, part_paths
from quire.weights.load import load_model, read_model_config
from quire.weights.loading_bar import LoadingBar
from quire.weights.source import ModelConfig

SMALL_MODEL_BYTES = 512 << 20
"""Of weights in 4 bits, some 900 million: below it they cost a model much."""

logger = logging.getLogger("quire")
startup = logging.getLogger("quire.startup")
"""What has been done of a start, at DEBUG; `quire generate --startup-report` listens."""


@dataclass(frozen=True, slots=True)
class CoreParts:
    """What a core is made of, before its executor is given to it."""

    scheduler: Scheduler
    executor: Executor
    info: CoreInfo
    host_weight_bytes: int | None
    """Of a model that this machine's processors compute; None: a device computes."""
    core_type: type[EngineCore]
    verifier: CachedBlockVerifier | None
    teacher: TeacherForcing
    """Reads texts with the same model, beside the core."""

    def core(self, executor: Executor | None = None) -> EngineCore:
        """The core itself; over another executor that passes on to this one, if one is given."""
        return self.core_type(self.scheduler, executor or self.executor, time.monotonic, self.verifier)


def compose_core(
    args: EngineArgs, path: Path, config: ModelConfig | None = None, share: ModelShare | None = None
) -> CoreParts:
    """Load the model of a directory or a GGUF file, and size everything.

    Args:
        config: what `read_model_config` says, if it was read.
        share: of the machine, where other models have theirs.

    Raises:
        ConfigurationError: naming the argument or the file at fault.
    """
    config = config or read_model_config(path)
    args, built = as_built(args, config.manifest)
    args = args if share is None else on_own_cores(args, share)
    ops, decisions = select_ops(args.device, args.threads, args.batch_invariant)
    if share is not None:
        args, decisions = _with_share(args, share, ops, decisions)
    startup.debug("operations: instruction set, threads")
    spec = config.spec
    model_len = resolve_model_len(args, spec.max_position_embeddings)
    fingerprint = _fingerprint(path)
    scheme = scheme_for(select_scheme(args.quantization, args.quantization_group_size), ops)
    cache_dtype = select_cache_dtype(args.kv_cache_dtype, ops)
    loaded: list[Decision] = []
    with LoadingBar() as bar:
        try:
            model = load_model(path, ops, args.dtype, model_len, bar.show, scheme, loaded.extend, config, cache_dtype)
        except MemoryError as error:
            raise ConfigurationError("the weights do not fit into memory", field="model") from error
    startup.debug("weights, read and packed or mapped")
    sizes = resolve_cache(args, _sizes(args, model, ops, model_len, share))
    logger.info("memory: %s", sizes.memory)
    overlap, loop = _loop(args, ops)
    grammars = grammar_compiler(args, path, spec.vocab_size)
    runner = _runner(args, model, ops, sizes, sampling_features(ops, grammars))
    startup.debug("cache, runner, sampler")
    in_use = check_budget(sizes.memory, ops)
    key = secrets.token_bytes(32)
    verifier = CachedBlockVerifier(key, runner.first_difference) if args.verify_cached_blocks else None
    model_decisions = _model_decisions(args, path, model, config.dtype_reason, built, scheme)
    model_decisions += [*loaded, *_head_decisions(spec, model)]
    decisions = [*model_decisions, *decisions, *sizes.decisions, *ops.decisions(), loop]
    decisions += [] if in_use is None else [in_use]
    prefix_cache = verifier or (PrefixCache(key) if args.enable_prefix_caching else NullPrefixCache())
    cache_config, description = _cache_config(args, sizes, model), _description(config, model, scheme)
    return CoreParts(
        _scheduler(args, sizes, prefix_cache, [] if grammars is None else [grammars]),
        LocalExecutor(runner, overlap),
        CoreInfo(sizes.max_model_len, spec.vocab_size, tuple(decisions), fingerprint, cache_config, description),
        model.weight_bytes if ops.memory() is None else None,
        OverlappingCore if overlap else EngineCore,
        verifier,
        TeacherForcing(model, ops, args.block_size),
    )


def _with_share(
    args: EngineArgs, share: ModelShare, ops: Device, decisions: list[Decision]
) -> tuple[EngineArgs, list[Decision]]:
    memory = ops.memory()
    part = memory_part(share, host_memory_bytes() if memory is None else memory.total)
    return replace(args, gpu_memory_utilization=part), [*decisions, share_decision(share, part)]


def _description(config: ModelConfig, model: Model, scheme: Scheme | None) -> ModelDescription:
    weight_format = scheme.name if scheme is not None else config.stored_as or model.dtype
    parameters = decoder_parameters(model.spec, config.names).values()
    return ModelDescription(config.family, sum(one.size for one in parameters), weight_format)


def _cache_config(args: EngineArgs, sizes: CachePlan, model: Model) -> Labels:
    """As vLLM labels `cache_config_info`, and the bytes that decoding reads: of weights, and of a token's cache."""
    spec = model.spec
    # Of an embedding that is no head only the rows of a step's tokens are read.
    table = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size * (4 if model.dtype == "float32" else 2)
    values = {
        "block_size": sizes.block_size,
        "num_gpu_blocks": sizes.num_blocks,
        "cache_dtype": args.kv_cache_dtype,
        "enable_prefix_caching": args.enable_prefix_caching,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "num_gpu_blocks_override": args.num_gpu_blocks_override,
        "read_weight_bytes": model.weight_bytes - table,
        "token_bytes": model.cache_shape(1, 1).bytes_per_block,
    }
    return tuple((name, str(value)) for name, value in values.items())


def _loop(args: EngineArgs, device: Device) -> tuple[bool, Decision]:
    """Whether the next step is planned while one is computed."""
    asked, on_host = args.async_scheduling, device.memory() is None
    overlap = not on_host if asked is None else asked
    why = "the processors compute" if on_host else "the device computes while the next step is planned"
    return overlap, Decision("async_scheduling", "on" if overlap else "off", why if asked is None else "as asked")


def _fingerprint(path: Path) -> str:
    """Names, sizes and times of the model's files."""
    files = part_paths(path) if is_gguf(path) else [item for item in path.iterdir() if item.is_file()]
    found = sorted((item.name, item.stat()) for item in files)
    return blake2b(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]).encode()).hexdigest()


def _model_decisions(
    args: EngineArgs, path: Path, model: Model, dtype_reason: str, built: list[Decision], scheme: Scheme | None
) -> list[Decision]:
    name = "embedded" if args.model is None else path.name
    return [
        Decision("model", name, f"{model.spec.num_layers} layers, {model.weight_bytes / 2**20:,.0f} MiB of weights"),
        *built,
        Decision("dtype", model.dtype, dtype_reason if args.dtype == "auto" else "as built" if built else "as asked"),
        *_quantization_decisions(scheme, model.weight_bytes, built),
        _cache_decision(args, model),
        *_rope_decisions(model),
    ]


def _cache_decision(args: EngineArgs, model: Model) -> Decision:
    shape = model.cache_shape(1, 1)
    reason = "auto: the type of the weights" if args.kv_cache_dtype == "auto" else "as asked"
    if shape.scale_bytes:
        reason += "; a scale for each head and token"
    return Decision("kv_cache_dtype", shape.dtype, f"{reason}; {shape.bytes_per_block:,} bytes a token")


def _rope_decisions(model: Model) -> list[Decision]:
    """Which of LongRoPE's factors all sequences have: by their own length the keys in the cache would change."""
    found = []
    for scaling in {layer.rope.scaling for layer in model.spec.layers if layer.rope is not None}:
        if isinstance(scaling, LongRopeScaling) and scaling.short_factors != scaling.long_factors:
            trained, longest = scaling.original_max_positions, model.max_model_len
            if takes_long_factors(scaling, longest):
                reason = (
                    f"max_model_len={longest} exceeds {trained} positions; transformers gives shorter sequences the "
                )
                reason += f"short ones, as max_model_len={trained} does"
            else:
                reason = f"max_model_len={longest} is within {trained} positions"
            found.append(Decision("longrope", "long" if takes_long_factors(scaling, longest) else "short", reason))
    return found


def _head_decisions(stated: DecoderSpec, model: Model) -> list[Decision]:
    if stated.tied_head == model.spec.tied_head:
        return []
    return [Decision("head", "lm_head.weight", "it differs from the embedding, though tie_word_embeddings is true")]


def _quantization_decisions(scheme: Scheme | None, weight_bytes: int, built: list[Decision]) -> list[Decision]:
    if scheme is None:
        return []
    bits = next((one.value for one in built if one.name == "bits"), None)
    if bits is not None:
        reason = f"layers {bits} bits a weight on average, as built; quire inspect says what each matrix has"
        return [Decision("quantization", scheme.name, reason)]
    linear, embedding = (f"{bits_per_weight(one)} bits a weight" for one in (scheme.linear, scheme.embedding))
    size = scheme.linear.group_size
    reason = f"layers {linear}" + (f" in groups of {size}" if size else "") + f", embedding and head {embedding}"
    if scheme.name in FOUR_BITS and weight_bytes < SMALL_MODEL_BYTES:
        reason += "; so small a model may lose much by 4 bits (docs/howto/quantize.md)"
        logger.warning("quantization %s: %s", scheme.name, reason)
    return [Decision("quantization", scheme.name, reason)]


def _captures(args: EngineArgs, device: Device) -> bool:
    """Whether decode steps are CUDA graphs: on a device, where launching them takes longer than computing them."""
    return device.memory() is not None and not args.enforce_eager


def sampling_features(ops: Provider, grammars: Grammars | None = None) -> tuple[SamplingFeature, ...]:
    """All that may edit logits, in the order in which it does: masks and biases before penalties, as vLLM has it."""
    held = () if grammars is None else (GrammarMasks(ops, grammars),)
    return *held, LogitMasks(ops), Penalties(ops), Typical(ops)


def _runner(
    args: EngineArgs, model: Model, ops: Provider, sizes: CachePlan, features: Sequence[SamplingFeature]
) -> ModelRunner:
    try:
        runner = ModelRunner(
            model,
            ops,
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            max_rows=sizes.max_num_seqs,
            max_model_len=sizes.max_model_len,
            features=features,
            capture=ops.capture if _captures(args, ops) else None,
            recomputes=args.verify_cached_blocks,
            logprobs_mode=args.logprobs_mode,
        )
        if ops.memory() is not None:
            runner.warm_up(
                StepShape(sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_model_len, sizes.block_size)
            )
        return runner
    except MemoryError as error:
        text = f"is too large: there is no room for the cache ({sizes.memory})"
        raise ConfigurationError(f"gpu_memory_utilization {text}", field="gpu_memory_utilization") from error


def _scheduler(
    args: EngineArgs, sizes: CachePlan, prefix_cache: PrefixCache | NullPrefixCache, rules: Sequence[AdmissionRule]
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks,
        soft_block_limit=sizes.soft_block_limit,
    )
    policy = make_policy(args.scheduling_policy)
    if args.record is None:
        return Scheduler(config, policy, prefix_cache, rules)
    if find_spec("quire.observe") is None:
        raise ConfigurationError("record needs the package quire.observe, which is not installed", field="record")
    # Not above: few are recorded, and an engine does without its format.
    from quire.observe.recording import RecordedScheduler

    return RecordedScheduler(args.record, config, policy, prefix_cache, rules, args.scheduling_policy)


def _sizes(args: EngineArgs, model: Model, ops: Provider, model_len: int, share: ModelShare | None) -> ModelSizes:
    free = None if ops.memory() is not None else free_memory_bytes() if share is None else free_part(share)
    shape = StepShape(args.max_num_seqs, resolve_batched_tokens(args), model_len, args.block_size, _captures(args, ops))
    return ModelSizes(
        max_position_embeddings=model.spec.max_position_embeddings,
        bytes_per_block=model.cache_shape(1, args.block_size).bytes_per_block,
        device="cpu" if ops.memory() is None else "cuda",
        memory=make_budget(model, ops, shape, is_shared=share is not None),
        free=free,
    )
