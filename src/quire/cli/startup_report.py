"""Where the time from the command to the first token goes: `quire generate --startup-report`."""

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

LOGGER = "quire.startup"
"""What composes an engine says here, at DEBUG, what it has just done."""


class StartupReport(logging.Handler):
    """The stages of one start in this process, each with its milliseconds."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._marks = [("interpreter, imports, flags", time.time())]
        self._begun_s = _process_began_s() or self._marks[0][1]
        logger = logging.getLogger(LOGGER)
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Another stage has ended."""
        self._marks.append((record.getMessage(), record.created))

    def first_token(self) -> None:
        """The first text of an answer is here: print the report, once, to standard error."""
        logger = logging.getLogger(LOGGER)
        if self not in logger.handlers:
            return
        self._marks.append(("prompt and first text", time.time()))
        logger.removeHandler(self)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        for name, milliseconds in self.stages():
            print(f"  {milliseconds:9.1f} ms  {name}", file=sys.stderr)
        print(f"  {(self._marks[-1][1] - self._begun_s) * 1e3:9.1f} ms  in all", file=sys.stderr)

    def stages(self) -> list[tuple[str, float]]:
        """Each stage with what it took; they add up to the whole."""
        ends = [self._begun_s, *(at_s for _, at_s in self._marks)]
        return [(name, (end - begin) * 1e3) for (name, end), begin in zip(self._marks, ends, strict=False)]


def _process_began_s() -> float | None:
    """Seconds since 1970, to a hundredth; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, proc(5)
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)
    return None
