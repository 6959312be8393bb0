"""This machine's memory, as far as this process may use it: control groups of both versions are read (cgroups(7))."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""By version, newest first: limit and use, and what of `memory.stat` the kernel would drop to make room."""


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is confined to, in bytes."""
    return min([_total_bytes(), *(limit for limit, _ in _limits())])


def free_memory_bytes() -> int:
    """What of it this process may still take without another being pushed out, in bytes."""
    return max(0, min([_available_bytes(), *(limit - used for limit, used in _limits())]))


def _total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available_bytes() -> int:
    for line in MEMINFO.read_text().splitlines() if MEMINFO.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _total_bytes()


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each group that has a limit: the process's own and those around it."""
    for folder in _folders():
        for limit_name, used_name, dropped_name in _FILES:
            limit = _number(folder / limit_name)
            if limit is not None:
                stat = folder / "memory.stat"
                words = [line.split() for line in stat.read_text().splitlines()] if stat.is_file() else []
                dropped = sum(int(pair[1]) for pair in words if pair[0] == dropped_name)
                yield limit, (_number(folder / used_name) or 0) - dropped


def _folders() -> Iterator[Path]:
    """In a container the group's own path is often not there: its files then stand at the root."""
    yield CGROUP_ROOT
    yield CGROUP_ROOT / "memory"
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            parts = Path(path.lstrip("/")).parts
            root = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
            yield from (root.joinpath(*parts[: end + 1]) for end in range(len(parts)))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
