"""IR → text, for people: one operation a line, regions indented, values numbered in order."""

from __future__ import annotations

from .ir import LEAVES, Op, OpCode, Program, Region


def program_text(program: Program) -> str:
    """The whole program: interface, then body."""
    lines = [f"kernel {program.name}, local size {program.local_size}"]
    lines += [f"  binding {i} {b.name}: {b.access} {b.kind} {b.dtype!r}" for i, b in enumerate(program.bindings)]
    lines += [f"  push {name}: {dtype!r}" for name, dtype, _ in program.push]
    lines += [f"  spec {name}: {dtype!r} = {default}" for name, (_, dtype, default) in program.spec.items()]
    _Text(program, lines).region(program.body, 1)
    return "\n".join(lines) + "\n"


class _Text:
    def __init__(self, program: Program, lines: list[str]) -> None:
        self.program = program
        self.lines = lines
        self.names: dict[Op, str] = {}

    def name(self, op: Op) -> str:
        """An operand: a value's number, or a leaf as it is."""
        if op.code not in LEAVES:
            return self.names[op]
        if op.code is OpCode.BUILTIN:
            return f"{op.arg[0]}.{op.arg[1]}"
        return str(op.arg)

    def region(self, region: Region, depth: int) -> None:
        if region.index is not None:
            self.names[region.index] = f"i{len(self.names)}"
            self.lines[-1] += f" as {self.names[region.index]}"
        for op in region.ops:
            self.names[op] = op.name or f"v{len(self.names)}"
            self.lines.append("  " * depth + self.line(op))
            for position, inner in enumerate(op.regions):
                if position:
                    self.lines.append("  " * depth + "else")
                self.region(inner, depth + 1)

    def line(self, op: Op) -> str:
        words = [str(op.code), *(self.name(s) for s in op.src)]
        if op.arg is not None:
            words.append(f"[{op.arg}]")
        return f"{self.names[op]}: {op.dtype!r} = {' '.join(words)}" if op.dtype is not None else " ".join(words)
