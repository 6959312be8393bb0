"""How the models of one server share a machine: memory for weights and cache, and processors.

::

    memory      weights of a | weights of b | spare: evenly, for the caches and steps of those that state no share
    processors  cores of a   | cores of b   | those that no model asked for by number: evenly, each at least one

The listener knows what is asked and how large the weights become (`ModelShare`); each core knows the machine, and takes
its part before anything is loaded. Both are the same whenever a core starts anew.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from quire.compose.weight_size import computes_on_host, weight_bytes
from quire.config import EngineArgs, ModelShare, mib
from quire.errors import ConfigurationError
from quire.ops.select import available_cores, core_processors
from quire.outputs import Decision
from quire.runner.host_memory import free_memory_bytes, host_memory_bytes


def shares_of(
    models: Sequence[tuple[EngineArgs, Path]],
    stated: Sequence[float | None],
    total: float,
    threads: int | None,
) -> list[ModelShare]:
    """The share of each model.

    Args:
        models: arguments and files.
        stated: the share of memory that each states for itself, None: a part of the rest.
        total: the share of memory that all may take.
        threads: of all together; None: the machine's cores.

    Raises:
        ConfigurationError: the shares are more than the machine, or the weights more than their share.
    """
    taken = sum(share for share in stated if share is not None)
    if taken > 1 or (taken >= total and None in stated):
        text = f"gpu_memory_utilization of the models is {taken:g} together; "
        text += "it may be 1 at most" if taken > 1 else f"those that state none would have nothing of {total:g}"
        raise ConfigurationError(text, field="gpu_memory_utilization")
    needs = tuple(weight_bytes(args, path) + (args.kv_cache_memory_bytes or 0) for args, path in models)
    names = tuple(args.model or "the embedded model" for args, _ in models)
    asked = tuple(args.threads for args, _ in models)
    free = free_memory_bytes()
    shares = [ModelShare(place, needs, tuple(stated), total, free, asked, threads) for place in range(len(models))]
    if all(computes_on_host(args) for args, _ in models):
        for share, name in zip(shares, names, strict=True):
            _check(share, name, host_memory_bytes())
    return shares


def _check(share: ModelShare, name: str, device_bytes: int) -> None:
    need, part = share.needs[share.place], memory_part(share, device_bytes)
    if need > part * device_bytes:
        text = f"gpu_memory_utilization gives {name} {max(0.0, part):.2f} of {mib(device_bytes)}; its weights and "
        text += f"the cache that it asks for are {mib(need)}, those of all models {mib(sum(share.needs))}"
        raise ConfigurationError(text, field="gpu_memory_utilization")


def memory_part(share: ModelShare, device_bytes: int) -> float:
    """The share of the device's memory that one of the models may take: what it states; else what it needs, and an
    even part of what those that state none leave."""
    own = share.stated[share.place]
    if own is not None:
        return own
    rest = share.total - sum(part for part in share.stated if part is not None)
    needs = [need for need, part in zip(share.needs, share.stated, strict=True) if part is None]
    spare = rest * device_bytes - sum(needs)
    return (share.needs[share.place] + spare / len(needs)) / device_bytes


def free_part(share: ModelShare) -> int:
    """Bytes of this machine's free memory that one of the models may count on beside all weights."""
    return max(0, share.free_bytes - sum(share.needs)) // len(share.needs)


def cores_part(share: ModelShare, cores: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """How many threads one of the models computes with, and the processors that are its own; none of its own where the
    models ask for more cores than there are."""
    most = min(len(cores), share.total_threads or len(cores))
    counts = list(_counts(share.threads, most))
    start = sum(counts[: share.place])
    own = cores[start : start + counts[share.place]]
    is_apart = sum(counts) <= len(cores)
    return counts[share.place], [processor for core in own for processor in core] if is_apart else []


def _counts(asked: Sequence[int | None], num_cores: int) -> Iterator[int]:
    """Those that ask have what they ask for; the others share the rest evenly, the first ones its remainder."""
    left, others = num_cores - sum(count or 0 for count in asked), sum(count is None for count in asked)
    for count in asked:
        if count is not None:
            yield count
            continue
        part = max(1, -(-left // others))
        left, others = left - part, others - 1
        yield part


def on_own_cores(args: EngineArgs, share: ModelShare) -> EngineArgs:
    """The arguments for this core's part of the processors, which this process keeps to from now on."""
    threads, processors = cores_part(share, core_processors()[: available_cores()[0]])
    if not processors:
        return replace(args, threads=threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
        return args  # what asks for no number takes the cores that it may use
    return replace(args, threads=threads)


def share_decision(share: ModelShare, part: float) -> Decision:
    """What this model has, and why."""
    reason = (
        "as stated"
        if share.stated[share.place] is not None
        else "the size of its weights, and an even part of what is spare"
    )
    return Decision("share", f"{part:.3g} of memory", f"model {share.place + 1} of {len(share.needs)}: {reason}")
