"""GGUF files written byte by byte, so that they can lie in any field."""

from __future__ import annotations

import struct

U16, U32, I32, STRING, ARRAY = 2, 4, 5, 8, 9


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(n_tensor: int, n_pair: int, version: int = 3, magic: bytes = b"GGUF", order: str = "<") -> bytes:
    return magic + struct.pack(f"{order}IQQ", version, n_tensor, n_pair)


def with_data(head: bytes, nbytes: int = 256) -> bytes:
    return head + bytes(-len(head) % 32) + bytes(range(256)) * (nbytes // 256)
