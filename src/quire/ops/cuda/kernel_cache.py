"""Compiled kernels, kept where the next start finds them.

Triton keeps what it compiles in a folder, by a hash of source, options, device and its own version. Here that is a
folder of the user's cache which belongs to one version of Triton and Quire, so that what an older one left can be
removed whole. What lies in it is loaded and run: so a folder that others can write is not used. `TRITON_CACHE_DIR`,
where it is set, is left as it is.
"""

import functools
import logging
import os
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton

logger = logging.getLogger("quire")


class KernelCache:
    """The folder, and what has come of it in this process. Listens to Triton's compiler from its making on."""

    def __init__(self, folder: Path | None) -> None:
        """None leaves Triton's own choice."""
        self.num_compiled = 0
        self.num_found = 0
        self._before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = self._listen
        if folder is not None:
            triton.knobs.cache.dir = str(folder)
        self.folder = Path(triton.knobs.cache.dir)

    def _listen(self, **told: Any) -> None:
        if told["cache_hit"]:
            self.num_found += 1
        else:
            self.num_compiled += 1
        if self._before is not None:
            self._before(**told)


@functools.cache
def kernel_cache() -> KernelCache:
    """That of this process: Triton has one."""
    if "TRITON_CACHE_DIR" in os.environ:
        return KernelCache(None)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "quire" / "kernels" / f"triton-{version('triton')}-quire-{_own_version()}"
    reason = _why_not(folder)
    if reason is not None:
        folder = Path(tempfile.mkdtemp(prefix="quire-kernels-"))
        logger.warning("compiled kernels are not kept for the next start: %s", reason)
    return KernelCache(folder)


def _own_version() -> str:
    import quire

    return quire.__version__


def _why_not(folder: Path) -> str | None:
    """Why a folder is not used; it is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return f"{folder} is not this user's alone to write"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"
