"""A SPIR-V module under construction: sections of words, numbered ids, interned types and constants.

It knows SPIR-V's layout rules and nothing of the kernel IR. Ids are given in order of first use: the same calls give the same
words. Source: SPIR-V specification 1.3, section 2.4 (logical layout of a module).
"""

from __future__ import annotations

import struct
from typing import Any

from ..types import CoopType, DType, u32
from .tables import ENUMS, GLSL_STD_450, OPS
from .tables_coop import COOP_ENUMS, COOP_OPS

MAGIC, VERSION_1_3, GENERATOR = 0x07230203, 0x00010300, 0
OPCODES: dict[str, int] = {name: number for name, (number, _) in {**OPS, **COOP_OPS}.items()}
VALUES: dict[str, dict[str, int]] = {k: {**ENUMS.get(k, {}), **COOP_ENUMS.get(k, {})} for k in {**ENUMS, **COOP_ENUMS}}
SECTIONS = ("capabilities", "extensions", "imports", "memory_model", "entry_points", "modes", "names", "decorations", "globals",
            "function")  # fmt: skip


def string_words(text: str) -> list[int]:
    """A literal string: UTF-8, zero-terminated, padded to words."""
    data = text.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))


def constant_words(dtype: DType, value: float) -> tuple[int, ...]:
    """The literal words of a scalar constant: one, or two of 64 bits."""
    if dtype.is_float:
        code, mask = ("<e", "<H") if dtype.bits == 16 else ("<f", "<I")
        bits: int = struct.unpack(mask, struct.pack(code, value))[0]
        return (bits,)
    if dtype.bits == 64:
        return int(value) & 0xFFFFFFFF, (int(value) >> 32) & 0xFFFFFFFF
    return (int(value) & 0xFFFFFFFF,)  # narrow signed integers are sign-extended, unsigned ones zero-extended


class Module:
    """Collects the words of a module."""

    def __init__(self) -> None:
        self._bound = 1
        self._sections: dict[str, list[int]] = {name: [] for name in SECTIONS}
        self._interned: dict[tuple[Any, ...], int] = {}

    def new_id(self) -> int:
        self._bound += 1
        return self._bound - 1

    def add(self, section: str, op: str, *words: int) -> None:
        """Append an instruction."""
        self._sections[section] += ((len(words) + 1) << 16 | OPCODES[op], *words)

    def extend(self, section: str, words: list[int]) -> None:
        """Append finished words."""
        self._sections[section] += words

    def _once(self, section: str, op: str, *words: int) -> None:
        key = (section, op, *words)
        if key not in self._interned:
            self._interned[key] = 0
            self.add(section, op, *words)

    def capability(self, name: str) -> None:
        self._once("capabilities", "Capability", VALUES["Capability"][name])

    def extension(self, name: str) -> None:
        self._once("extensions", "Extension", *string_words(name))

    def name(self, target: int, text: str) -> None:
        if text:
            self.add("names", "Name", target, *string_words(text))

    def decorate(self, target: int, decoration: str, *operands: int) -> None:
        self.add("decorations", "Decorate", target, VALUES["Decoration"][decoration], *operands)

    def decorate_member(self, target: int, member: int, decoration: str, *operands: int) -> None:
        self.add("decorations", "MemberDecorate", target, member, VALUES["Decoration"][decoration], *operands)

    # types and constants

    def intern(self, op: str, *operands: int, key: tuple[Any, ...] = ()) -> int:
        """The id of a type without decorations: one per operands (and `key`, where equal operands must stay apart)."""
        full = (op, *operands, *key)
        found = self._interned.get(full)
        if found is None:
            found = self._interned[full] = self.new_id()
            self.add("globals", op, found, *operands)
        return found

    def type(self, dtype: DType | CoopType) -> int:
        """The id of a value type."""
        found = self._interned.get((dtype,))
        if found is None:
            found = self._interned[(dtype,)] = self._declare_type(dtype)
        return found

    def _declare_type(self, dtype: DType | CoopType) -> int:
        if isinstance(dtype, CoopType):
            use = VALUES["CooperativeMatrixUse"][{"a": "MatrixAKHR", "b": "MatrixBKHR", "acc": "MatrixAccumulatorKHR"}[dtype.use]]
            sizes = [self.constant(u32, n) for n in (VALUES["Scope"]["Subgroup"], dtype.rows, dtype.cols, use)]
            return self.intern("TypeCooperativeMatrixKHR", self.type(dtype.element), *sizes)
        if dtype.count > 1:
            return self.intern("TypeVector", self.type(dtype.scalar), dtype.count)
        if dtype.is_bool:
            return self.intern("TypeBool")
        if dtype.is_float:
            return self.intern("TypeFloat", dtype.bits)
        return self.intern("TypeInt", dtype.bits, int(dtype.is_signed))

    def pointer(self, storage: str, target: int) -> int:
        return self.intern("TypePointer", VALUES["StorageClass"][storage], target)

    def constant(self, dtype: DType, value: Any) -> int:
        """A constant; a tuple for a vector."""
        if dtype.count > 1:
            parts = [self.constant(dtype.scalar, v) for v in value]
            return self._typed_constant("ConstantComposite", self.type(dtype), *parts)
        if dtype.is_bool:
            return self._typed_constant("ConstantTrue" if value else "ConstantFalse", self.type(dtype))
        return self._typed_constant("Constant", self.type(dtype), *constant_words(dtype, value))

    def _typed_constant(self, op: str, type_id: int, *words: int) -> int:
        key = (op, type_id, *words)
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = self.new_id()
            self.add("globals", op, type_id, found, *words)
        return found

    def spec_constant(self, dtype: DType, number: int, default: float, name: str) -> int:
        """A specialization constant."""
        result, type_id = self.new_id(), self.type(dtype)
        if dtype.is_bool:
            self.add("globals", "SpecConstantTrue" if default else "SpecConstantFalse", type_id, result)
        else:
            self.add("globals", "SpecConstant", type_id, result, *constant_words(dtype, default))
        self.decorate(result, "SpecId", number)
        self.name(result, name)
        return result

    def global_variable(self, storage: str, target_type: int, name: str) -> int:
        """A variable outside functions, pointing to `target_type`."""
        result, pointer = self.new_id(), self.pointer(storage, target_type)
        self.add("globals", "Variable", pointer, result, VALUES["StorageClass"][storage])
        self.name(result, name)
        return result

    def glsl_import(self) -> int:
        """The id of GLSL.std.450."""
        found = self._interned.get(("glsl",))
        if found is None:
            found = self._interned[("glsl",)] = self.new_id()
            self.add("imports", "ExtInstImport", found, *string_words("GLSL.std.450"))
        return found

    def finish(self) -> bytes:
        """The module's bytes, little-endian."""
        words = [MAGIC, VERSION_1_3, GENERATOR, self._bound, 0]
        for section in SECTIONS:
            words += self._sections[section]
        return struct.pack(f"<{len(words)}I", *words)


__all__ = ["GLSL_STD_450", "OPCODES", "VALUES", "Module", "string_words"]
