"""The constants of this machine for `quire plan`: measured once, kept in the user's cache folder."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import quire

if TYPE_CHECKING:
    from quire.plan.machine import MachineRates

FILE = "machine-rates.json"
MAX_BYTES = 2**20
STEPS = 64
"""Of the control plane, for each of its two timings."""
ROWS = (1, 16)
WEIGHT_BYTES = 2**25
"""Read between them, as a step reads its weights: what Python needs is in no cache then."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates, and when they were measured."""

    machine: str
    """What they hold for: processor, instruction set, threads, version of Quire."""
    at_s: float
    """Seconds since 1970."""
    rates: "MachineRates"

    def age(self, now_s: float) -> str:
        """For people."""
        minutes = max(0.0, now_s - self.at_s) / 60
        if minutes < 1:
            return "measured now"
        size, unit = (minutes, "min") if minutes < 120 else (minutes / 60, "h")
        return f"measured {size:.0f} {unit} ago" if size < 48 or unit == "min" else f"measured {size / 24:.0f} days ago"


def machine_rates(again: bool = False) -> Measured:
    """Those of the cache, if they are of this machine and version; else measure, which takes some seconds.

    Args:
        again: measure whatever is known.
    """
    from quire.ops.select import select_ops

    ops, decisions = select_ops("cpu", None)
    chosen = {one.name: one.value for one in decisions}
    machine = f"{_processor()}, {chosen['instruction_set']}, {chosen['threads']} threads, quire {quire.__version__}"
    found = None if again else _read(machine)
    if found is None:
        found = Measured(machine, time.time(), _measure(ops))
        _write(found)
    return found


def cache_file() -> Path:
    """Where they are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "quire" / FILE


def kept_read_rates() -> list[tuple[float, float]] | None:
    """Bytes a second, by the bytes that are read over and over, if they were measured on this processor: of the file
    alone, without what measures."""
    import json

    with suppress(OSError, ValueError, LookupError, TypeError):
        with cache_file().open("rb") as file:
            values = json.loads(file.read(MAX_BYTES))
        if values["machine"].startswith(_processor() + ","):
            return [(float(size), float(rate)) for size, rate in values["rates"]["read"]]
    return None


def _read(machine: str) -> Measured | None:
    import msgspec

    with suppress(OSError, msgspec.MsgspecError, ValueError):
        with cache_file().open("rb") as file:
            data = file.read(MAX_BYTES)
        found = _decode(data)
        return found if found.machine == machine else None
    return None


def _decode(data: bytes) -> Measured:
    import msgspec

    from quire.plan.machine import FORMATS, MachineRates

    values = msgspec.json.decode(data, type=dict)
    rates = msgspec.convert(values["rates"], MachineRates) if set(values) == {"machine", "at_s", "rates"} else None
    if rates is None or not rates.read or any(not rates.linear.get(name) for name in FORMATS):
        raise ValueError("no rates")
    if min(rate for points in (rates.read, *rates.linear.values()) for _, rate in points) <= 0:
        raise ValueError("no rate is zero")
    return Measured(str(values["machine"]), float(values["at_s"]), rates)


def _write(found: Measured) -> None:
    """A cache that cannot be written is no cache."""
    import msgspec

    path = cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(msgspec.json.encode({"machine": found.machine, "at_s": found.at_s, "rates": found.rates}))
        beside.replace(path)


def _measure(ops: object) -> "MachineRates":
    from functools import partial

    import numpy as np

    from quire.bench.core_clock import time_core
    from quire.bench.roofline import measure_units
    from quire.cli.bench_core import with_runner
    from quire.ops.cpu import CpuOps
    from quire.plan.machine import MachineRates
    from quire.plan.probe import probe_attention, probe_call, probe_cold, probe_linear, probe_reads
    from quire.runner.host_memory import host_memory_bytes

    assert isinstance(ops, CpuOps)
    clock = time.perf_counter
    decode_s, prompt_s = probe_attention(ops, "bfloat16", clock)
    weights = np.ones(WEIGHT_BYTES, np.uint8)
    between = partial(ops.probe, "read", weights)
    steps = [
        time_core(lambda count: with_runner(count, STEPS), rows, num_steps=STEPS, between=between) for rows in ROWS
    ]
    read, call_s = probe_reads(ops.probe, clock), probe_call(ops, clock)
    first_s, last_s = ((one.core_us + one.executor_us) * 1e-6 for one in steps)
    row_s = max(0.0, (last_s - first_s) / (ROWS[1] - ROWS[0]))
    return MachineRates(
        read=read,
        units=measure_units(ops.probe, clock),
        linear=probe_linear(ops, clock),
        decode_key_s=decode_s,
        prompt_key_s=prompt_s,
        call_s=call_s,
        cold_s=probe_cold(ops, read[-1][1], call_s, clock),
        step_s=max(0.0, first_s - row_s),
        row_s=row_s,
        memory_bytes=host_memory_bytes(),
    )


def _processor() -> str:
    """As Linux names it."""
    with suppress(OSError, StopIteration, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return "a processor"
