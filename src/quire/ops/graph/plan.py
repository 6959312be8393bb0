"""Where the buffers of a program lie."""

from dataclasses import dataclass

from quire.ops.graph.program import Program


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Where each buffer begins, in floats for each token, in one of two memories.

    What lies between two attentions is a segment, whose tokens may be computed in any order, tile by tile. A buffer
    that is *local* is used in one segment only, by one token tile at a time; all others are *persistent*: they are
    there for the tokens of a whole step.
    """

    offsets: tuple[int, ...]
    is_local: tuple[bool, ...]
    persistent_floats: int
    """Memory for each token of a step."""
    local_floats: int
    """Memory for each token of the tiles that are being computed."""


def plan_memory(program: Program) -> BufferPlan:
    """Two local buffers share memory if one is last used before the other is first written; two persistent ones, if
    one's last segment ends before the other's first begins. Those that fusing left unused share one place. The buffer
    of the result lies outside, at 0."""
    first = dict.fromkeys(range(len(program.buffers)), (0, 0))  # segment and instruction, from 1; 0 where it is unused
    last = first.copy()
    segment = 0
    for index, instruction in enumerate(program.instructions, 1):
        segment += instruction.ends_segment
        for view in instruction.touches():
            if last[view.buffer] == (0, 0):
                first[view.buffer] = segment, index
            last[view.buffer] = segment, index
        segment += instruction.ends_segment
    del first[program.result.buffer]
    unused = [program.buffers[number].floats for number, span in first.items() if span == (0, 0)]
    is_local = [number in first and first[number][0] == last[number][0] for number in last]
    offsets = [0] * len(is_local)
    used = [one for one in first if first[one] != (0, 0)]
    floats = [
        _pack(program, {one: (first[one][which], last[one][which]) for one in used if is_local[one] == which}, offsets)
        for which in (False, True)
    ]
    return BufferPlan(tuple(offsets), tuple(is_local), floats[0], max(floats[1], *unused, 0))


def _pack(program: Program, spans: dict[int, tuple[int, int]], offsets: list[int]) -> int:
    """Sets the offsets of buffers that are alive from one moment to another; returns the memory they need."""
    sizes = [buffer.floats for buffer in program.buffers]
    placed: list[int] = []
    for buffer in sorted(spans, key=lambda one: spans[one][0]):
        for other in sorted(placed, key=lambda one: offsets[one]):
            alive = spans[other][1] >= spans[buffer][0]
            ends_before = offsets[buffer] + sizes[buffer] <= offsets[other]
            if alive and not ends_before and offsets[buffer] < offsets[other] + sizes[other]:
                offsets[buffer] = offsets[other] + sizes[other]
        placed.append(buffer)
    return max((offsets[one] + sizes[one] for one in placed), default=0)
