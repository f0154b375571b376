"""SPIR-V words → text, in the style of spirv-dis. Names come from OpName; everything else is %number."""

from __future__ import annotations

import struct

from .module import MAGIC, VALUES
from .tables import GLSL_STD_450, OPS
from .tables_coop import COOP_OPS

BY_NUMBER = {number: (name, kinds) for name, (number, kinds) in {**OPS, **COOP_OPS}.items()}
ENUM_NAMES = {kind: {value: name for name, value in names.items()} for kind, names in VALUES.items()}
GLSL_NAMES = {number: name for name, number in GLSL_STD_450.items()}
INDENT = 16


def disassemble(module: bytes) -> str:
    """The text of a module."""
    words = struct.unpack(f"<{len(module) // 4}I", module)
    if words[0] != MAGIC:
        raise ValueError("no SPIR-V module: wrong magic number")
    lines = [f"; SPIR-V {words[1] >> 16}.{words[1] >> 8 & 255}, ids below {words[3]}"]
    return "\n".join(lines + _Printer(words).lines()) + "\n"


def _string(words: tuple[int, ...], at: int) -> tuple[str, int]:
    """A literal string and the position after it."""
    data = struct.pack(f"<{len(words) - at}I", *words[at:])
    text = data[: data.index(0)].decode()
    return text, at + len(text.encode()) // 4 + 1


class _Printer:
    def __init__(self, words: tuple[int, ...]) -> None:
        self.words = words
        self.names: dict[int, str] = {}
        self.types: dict[int, tuple[str, int]] = {}  # id of a number type → (kind, bits)

    def instructions(self) -> list[tuple[int, ...]]:
        at, found = 5, []
        while at < len(self.words):
            size = self.words[at] >> 16
            found.append((self.words[at] & 0xFFFF, *self.words[at + 1 : at + size]))
            at += size
        return found

    def lines(self) -> list[str]:
        all_of_them = self.instructions()
        self._collect(all_of_them)
        return [self._line(i) for i in all_of_them]

    def _collect(self, instructions: list[tuple[int, ...]]) -> None:
        used: dict[str, int] = {}
        for opcode, *rest in instructions:
            name = BY_NUMBER[opcode][0]
            if name == "Name":
                text = _string(tuple(rest), 1)[0]
                used[text] = used.get(text, 0) + 1
                self.names[rest[0]] = text if used[text] == 1 else f"{text}_{used[text]}"
            elif name in ("TypeInt", "TypeFloat"):
                kind = "float" if name == "TypeFloat" else "int" if rest[2] else "uint"
                self.types[rest[0]] = (kind, rest[1])

    def id(self, number: int) -> str:
        return "%" + self.names.get(number, str(number))

    def _line(self, instruction: tuple[int, ...]) -> str:
        opcode, *rest = instruction
        name, kinds = BY_NUMBER[opcode]
        texts, result = self._operands(name, kinds, tuple(rest))
        left = f"{self.id(result)} = ".rjust(INDENT) if result else " " * INDENT
        return (left + " ".join([f"Op{name}", *texts])).rstrip()

    def _operands(self, name: str, kinds: tuple[str, ...], words: tuple[int, ...]) -> tuple[list[str], int]:
        texts: list[str] = []
        result, at, position = 0, 0, 0
        while at < len(words):
            kind = kinds[position].rstrip("?*") if position < len(kinds) else self._extra_kind(name, words)
            position += position < len(kinds) and not kinds[position].endswith("*")
            if kind == "IdResult":
                result, at = words[at], at + 1
            elif kind == "LiteralString":
                text, at = _string(words, at)
                texts.append(f'"{text}"')
            elif kind == "LiteralContextDependentNumber":
                texts.append(self._number(words[0], words[at:]))
                at = len(words)
            else:
                texts.append(self._operand(kind, words[at], words))
                at += 1
        return texts, result

    def _extra_kind(self, name: str, words: tuple[int, ...]) -> str:
        """Operands that depend on an earlier one: those of decorations and of OpSpecConstantOp."""
        if name in ("Decorate", "MemberDecorate"):
            built_in = VALUES["Decoration"]["BuiltIn"]
            return "BuiltIn" if built_in in words[1:3] and words[-2] == built_in else "LiteralInteger"
        return "IdRef" if name == "SpecConstantOp" else "LiteralInteger"

    def _operand(self, kind: str, word: int, words: tuple[int, ...]) -> str:
        if kind.startswith(("Id", "PairIdRefIdRef")):
            return self.id(word)
        if kind == "LiteralExtInstInteger":
            return GLSL_NAMES.get(word, str(word))
        if kind == "LiteralSpecConstantOpInteger":
            return BY_NUMBER[word][0]
        return self._enumerant(kind, word)

    def _enumerant(self, kind: str, word: int) -> str:
        names = ENUM_NAMES.get(kind, {})
        if word in names or kind not in ("MemorySemantics", "CooperativeMatrixOperands"):
            return names.get(word, str(word))
        return "|".join(n for bit, n in sorted(names.items()) if bit and word & bit)

    def _number(self, type_id: int, words: tuple[int, ...]) -> str:
        """A literal of one word, or of two, the lower first."""
        kind, bits = self.types[type_id]
        word = sum(part << (32 * i) for i, part in enumerate(words))
        if kind == "float":
            code, data = ("<e", struct.pack("<H", word)) if bits == 16 else ("<f", struct.pack("<I", word))
            return repr(struct.unpack(code, data)[0])
        size = 32 * len(words)
        return str(word - (1 << size) if kind == "int" and word >> (size - 1) else word)
