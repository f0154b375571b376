"""The GLSL back end: the same program as text that people read and glslang compiles, to check the SPIR-V back end."""

from .emit import emit_glsl

__all__ = ["emit_glsl"]
