"""The SPIR-V back end: IR → words, and words → text."""

from .disassemble import disassemble
from .emit import emit_module

__all__ = ["disassemble", "emit_module"]
