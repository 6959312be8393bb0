"""What is free for this process, from files as the kernel writes them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.runner import host_memory
from quire.runner.host_memory import free_memory_bytes, host_memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
AVAILABLE = 1 << 29
Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts files where the kernel would."""
    monkeypatch.setattr(host_memory, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")

    def make(files: dict[str, str]) -> None:
        for name, text in {"meminfo": f"MemTotal: 9 kB\nMemAvailable: {AVAILABLE // 1024} kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return make


@pytest.mark.parametrize("limit", [1 << 20, 1 << 60])
@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_host_is_no_larger_than_its_container(write: Write, name: str, limit: int) -> None:
    write({f"cgroup/{name}": f"{limit}\n"})
    assert host_memory_bytes() == min(MACHINE, limit)
    assert free_memory_bytes() == min(AVAILABLE, limit), "nothing says that any of it is used"


def test_without_a_limit_what_the_machine_has_available_is_free(write: Write) -> None:
    write({"cgroup/memory.max": "max\n", "own": "0::/user.slice\n"})
    assert (host_memory_bytes(), free_memory_bytes()) == (MACHINE, AVAILABLE)


def test_of_all_groups_around_it_the_narrowest_counts(write: Write) -> None:
    """Version 2, on a machine whose service manager limits the service; the cache of files is no loss."""
    write(
        {
            "own": "0::/system.slice/quire.service\n",
            "cgroup/system.slice/memory.max": f"{1 << 28}\n",
            "cgroup/system.slice/memory.current": f"{1 << 27}\n",
            "cgroup/system.slice/quire.service/memory.max": f"{1 << 26}\n",
            "cgroup/system.slice/quire.service/memory.current": f"{(1 << 26) - 3000}\n",
            "cgroup/system.slice/quire.service/memory.stat": "anon 5\ninactive_file 2000\nactive_file 9\n",
        }
    )
    assert (host_memory_bytes(), free_memory_bytes()) == (1 << 26, 5000)


def test_version_1_has_its_own_names(write: Write) -> None:
    write(
        {
            "own": "5:cpu,cpuacct:/a\n4:memory:/docker/x\n0::/\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/docker/x/memory.limit_in_bytes": "1000000\n",
            "cgroup/memory/docker/x/memory.usage_in_bytes": "900000\n",
            "cgroup/memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
            "cgroup/memory/a/memory.limit_in_bytes": "5\n",
        }
    )
    assert (host_memory_bytes(), free_memory_bytes()) == (1_000_000, 150_000)


def test_more_in_use_than_allowed_leaves_nothing(write: Write) -> None:
    write({"cgroup/memory.max": "10\n", "cgroup/memory.current": "12\n"})
    assert free_memory_bytes() == 0
