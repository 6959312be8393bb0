"""A bar on standard error while a large model is loaded; nothing where loading is quick. Where standard error is no
terminal: nothing, or a line now and then of work that takes minutes."""

import sys
import time
from typing import Any, Self

DELAY_S = 0.5
LINE_S = 10.0
"""Between two lines in a log."""


class LoadingBar:
    """`show(bytes done, bytes in all)` after each parameter. A context manager.

    Args:
        lines: where there is no terminal, write how far it is every `LINE_S` seconds at most.
        is_quiet: write nothing anywhere.
    """

    def __init__(self, text: str = "Loading weights", *, lines: bool = False, is_quiet: bool = False) -> None:
        self._text = text
        self._lines = lines and not is_quiet and sys.stderr is not None
        self._bar: Any = None
        self._is_terminal = not is_quiet and sys.stderr is not None and sys.stderr.isatty()
        self._start_s = self._line_s = time.monotonic()

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """The bar appears once loading has taken `DELAY_S`."""
        if not self._is_terminal:
            self._line(done_bytes, total_bytes)
            return
        if time.monotonic() - self._start_s < DELAY_S:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=self._text, total=total_bytes, unit="B", unit_scale=True, leave=False)
        self._bar.update(done_bytes - self._bar.n)

    def _line(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if not self._lines or now_s - self._line_s < LINE_S:
            return
        self._line_s, taken_s = now_s, now_s - self._start_s
        left = f", about {taken_s * (total - done) / done:,.0f} s left" if done else ""
        print(f"{self._text}: {done / max(total, 1):.0%} after {taken_s:,.0f} s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
