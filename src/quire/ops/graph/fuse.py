"""Passes over a program: each gives another one that computes the same bits with less memory traffic."""

from dataclasses import replace

from quire.ops.graph.operations import Add, Attention, Linear, Norm
from quire.ops.graph.program import Buffer, Instruction, Program, View


def fuse(program: Program) -> Program:
    """All passes, each once."""
    return propagate_bf16_layout(add_to_residual(select_output_tokens(program)))


def select_output_tokens(program: Program) -> Program:
    """What follows the last writing of keys and values is computed for the output tokens of a step only (as
    by vLLM's `logits_indices`)."""
    instructions = program.instructions
    last = max((at for at, one in enumerate(instructions) if isinstance(one, Attention)), default=0)
    attention, after = instructions[last], instructions[last + 1 :]
    made = {view.buffer for one in instructions[:last] for view in one.writes()}
    if (
        not isinstance(attention, Attention)
        or program.result.buffer in made
        or any(one.reads_numbers() for one in after)
    ):
        return program
    used = {attention.q.buffer} | made & {view.buffer for one in after for view in one.reads()}
    views = tuple(View(number, 0, 1, program.buffers[number].width) for number in sorted(used))
    return replace(program, instructions=(*instructions[:last], replace(attention, selected=views), *after))


def add_to_residual(program: Program) -> Program:
    """The result of a GEMM that is only ever added to a residual is added by the GEMM: one array less is written and
    read."""
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


def propagate_bf16_layout(program: Program) -> Program:
    """What only GEMMs read, and round to bfloat16, is made as bfloat16 in the layout of AMX tiles: the rounding is the
    same, once."""
    wanted: set[int] = set()
    refused = {program.result.buffer}
    for instruction in program.instructions:
        takes = {view.buffer for view in instruction.amx_bf16_inputs()}
        gives = {view for view in instruction.amx_bf16_outputs() if _whole(view, program.buffers)}
        wanted |= takes
        refused |= {view.buffer for view in instruction.reads()} - takes
        refused |= {view.buffer for view in instruction.writes() if view not in gives}
    buffers = [
        replace(buffer, layout="amx_bf16") if number in wanted - refused else buffer
        for number, buffer in enumerate(program.buffers)
    ]
    return replace(program, buffers=tuple(buffers))


def _whole(view: View, buffers: tuple[Buffer, ...]) -> bool:
    return view.groups == 1 and view.width == buffers[view.buffer].width


def _touching(program: Program) -> list[list[int]]:
    """For each buffer the instructions that read or write it, by their places."""
    found: list[list[int]] = [[] for _ in program.buffers]
    for at, instruction in enumerate(program.instructions):
        for number in {view.buffer for view in instruction.touches()}:
            found[number].append(at)
    return found
