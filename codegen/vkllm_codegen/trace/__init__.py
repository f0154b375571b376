"""The tracing front end: running a Python function once records the operations of a kernel."""

from .block import Block
from .kernel import Kernel, kernel, pack_push, read, readwrite, texel, trace, write
from .value import Buffer, PrivateArray, Shared, Value, Var

__all__ = [
    "Block", "Buffer", "Kernel", "PrivateArray", "Shared", "Value", "Var", "kernel", "pack_push", "read", "readwrite", "texel",
    "trace", "write",
]  # fmt: skip
