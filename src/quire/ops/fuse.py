"""Passes over a program: each gives another one that computes the same bits with less memory traffic."""

from dataclasses import replace

from quire.ops.program import (
    Activate,
    Add,
    Attention,
    Buffer,
    Embed,
    Instruction,
    Linear,
    Norm,
    Program,
    View,
    reads,
    writes,
)


def fuse(program: Program) -> Program:
    """All passes, each once."""
    return hand_on_tiles(add_to_residual(narrow_outputs(program)))


def narrow_outputs(program: Program) -> Program:
    """What follows the last writing of keys and values is computed for the outputs of a step only."""
    instructions = program.instructions
    last = max((at for at, one in enumerate(instructions) if isinstance(one, Attention)), default=0)
    attention, after = instructions[last], instructions[last + 1 :]
    made = {view.buffer for one in instructions[:last] for view in writes(one)}
    if (
        not isinstance(attention, Attention)
        or program.result.buffer in made
        or any(isinstance(one, Embed) for one in after)
    ):
        return program
    kept = {attention.q.buffer} | made & {view.buffer for one in after for view in reads(one)}
    views = tuple(View(number, 0, 1, program.buffers[number].width) for number in sorted(kept))
    return replace(program, instructions=(*instructions[:last], replace(attention, narrows=views), *after))


def add_to_residual(program: Program) -> Program:
    """A product that is only ever added to a residual is added where it is made: one array less is written and read."""
    instructions: list[Instruction | None] = list(program.instructions)
    touching = _touching(program)
    for index, linear in enumerate(instructions):
        if not isinstance(linear, Linear) or linear.adds or linear.kind is not None:
            continue
        uses = [at for at in touching[linear.y.buffer] if at != index]
        if len(uses) != 1 or program.result.buffer == linear.y.buffer:
            continue
        user = instructions[uses[0]]
        residual = _residual(user, linear.y, program.buffers)
        if residual is None or any(index < at < uses[0] for at in touching[residual.buffer]):
            continue
        instructions[index] = replace(linear, y=residual, adds=True)
        instructions[uses[0]] = replace(user, x=residual, residual=None) if isinstance(user, Norm) else None
    return replace(program, instructions=tuple(one for one in instructions if one is not None))


def _residual(user: Instruction | None, x: View, buffers: tuple[Buffer, ...]) -> View | None:
    """The whole buffer that `user` adds x to, if that is what it does with it."""
    match user:
        case Norm(x=added, residual=View() as into) | Add(x=added, y=into) if (
            added == x and into.groups == 1 and into.width == buffers[into.buffer].width
        ):
            return into
        case _:
            return None


def hand_on_tiles(program: Program) -> Program:
    """What only products read, and round to bfloat16, is made as bfloat16: the rounding is the same, once."""
    wanted: set[int] = set()
    refused = {program.result.buffer}
    for instruction in program.instructions:
        takes = {instruction.x.buffer} if isinstance(instruction, Linear) and instruction.weight.reads_tiles else set()
        wanted |= takes
        refused |= {view.buffer for view in reads(instruction)} - takes
        gives = _whole(instruction, program.buffers)
        refused |= {view.buffer for view in writes(instruction) if view != gives}
    buffers = [
        replace(buffer, form="tiles") if number in wanted - refused else buffer
        for number, buffer in enumerate(program.buffers)
    ]
    return replace(program, buffers=tuple(buffers))


def _whole(instruction: Instruction, buffers: tuple[Buffer, ...]) -> View | None:
    """What an instruction writes, if it can write it as bfloat16."""
    match instruction:
        case Linear(y=y, adds=False) | Norm(y=y) | Activate(y=y) if (
            y.groups == 1 and y.width == buffers[y.buffer].width
        ):
            return y
        case _:
            return None


def _touching(program: Program) -> list[list[int]]:
    """For each buffer the instructions that read or write it, by their places."""
    found: list[list[int]] = [[] for _ in program.buffers]
    for at, instruction in enumerate(program.instructions):
        for number in {view.buffer for view in (*reads(instruction), *writes(instruction))}:
            found[number].append(at)
    return found
