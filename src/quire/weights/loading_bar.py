"""A bar on standard error while a large model is loaded; nothing where it is no terminal, or where loading is quick."""

import sys
import time
from typing import Any, Self

DELAY_S = 0.5


class LoadingBar:
    """`show(bytes done, bytes in all)` after each parameter. A context manager."""

    def __init__(self, text: str = "Loading weights") -> None:
        self._text = text
        self._bar: Any = None
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._start_s = time.monotonic()

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """The bar appears once loading has taken `DELAY_S`."""
        if not self._is_terminal or time.monotonic() - self._start_s < DELAY_S:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=self._text, total=total_bytes, unit="B", unit_scale=True, leave=False)
        self._bar.update(done_bytes - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
