"""Outputs of one request on their way from the engine's thread to the reader's event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from quire.engine.inputs import ParsedRequest
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import RequestOutputKind

MAX_UNREAD = 16
"""Outputs that lie unread one by one; when there are more all of them become one."""


class Stream:
    """What was made and not yet read, on the reader's loop.

    A reader that falls behind gets fewer and larger outputs: nothing is lost, and what is unread is never more than
    the request itself may hold.
    """

    def __init__(self, parsed: ParsedRequest) -> None:
        self.parsed = parsed
        self.loop = asyncio.get_running_loop()
        self._kind = parsed.params.output_kind
        self._unread: deque[RequestOutput] = deque()
        self._failure: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        """On the loop: one more output, or the exception that ends the stream."""
        if isinstance(output, Exception):
            self._failure = output
        else:
            self._unread.append(output)
            if len(self._unread) > MAX_UNREAD:
                self._unread = deque([self._one()])
        self._ready.set()

    async def get(self, deadline_s: float | None) -> RequestOutput:
        """The next output, waited for.

        Raises:
            TimeoutError: the loop's clock reached `deadline_s`.
            Exception: the one that ended the stream.
        """
        if not self._unread and self._failure is None:
            async with asyncio.timeout_at(deadline_s):
                self._ready.clear()
                await self._ready.wait()
        if self._unread:
            return self._unread.popleft()
        assert self._failure is not None
        raise self._failure.with_traceback(None)

    def _one(self) -> RequestOutput:
        outputs = list(self._unread)
        return joined(outputs) if self._kind is RequestOutputKind.DELTA else outputs[-1]


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of kind DELTA as one: each sequence's differences together."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    parts: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for choice in output.outputs:
            parts.setdefault(choice.index, []).append(choice)
    return replace(last, outputs=[joined_choice(parts[index]) for index in sorted(parts)])


def joined_choice(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    """Consecutive differences of one sequence as one."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    return replace(
        last,
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=None if last.logprobs is None else [item for part in parts for item in part.logprobs or ()],
    )
