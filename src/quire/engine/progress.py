"""The progress bar of `LLM.generate`."""

import time
from types import TracebackType
from typing import Any, Self

from quire.outputs import RequestOutput


class Progress:
    """One tick for each finished prompt, with tokens per second. Shows nothing when not wanted."""

    def __init__(self, num_prompts: int, *, show: bool) -> None:
        self._bar: Any = None
        self._start_s = time.monotonic()
        self._input_tokens = 0
        self._output_tokens = 0
        if show:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=num_prompts, desc="Processed prompts", dynamic_ncols=True)

    def advance(self, output: RequestOutput) -> None:
        """A prompt has ended."""
        if self._bar is None:
            return
        self._input_tokens += len(output.prompt_token_ids)
        self._output_tokens += sum(len(item.token_ids) for item in output.outputs)
        spent_s = max(time.monotonic() - self._start_s, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._input_tokens / spent_s:.1f} tok/s, out {self._output_tokens / spent_s:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
