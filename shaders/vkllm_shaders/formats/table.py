"""Every ggml type that has kernels, by name."""

from __future__ import annotations

from vkllm_codegen.errors import KernelError
from vkllm_shaders.formats.base import Format
from vkllm_shaders.formats.blocks32 import Q8, Nibble32
from vkllm_shaders.formats.codebook import IQ4NL, IQ4XS, MXFP4
from vkllm_shaders.formats.k_quants16 import Q2K, Q3K, Q6K
from vkllm_shaders.formats.k_quants32 import KNibble
from vkllm_shaders.formats.plain import Float

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Float("F32", 1, 4, n_sub=0),
        Float("F16", 1, 2, n_sub=0),
        Float("BF16", 1, 2, n_sub=0),
        Nibble32("Q4_0", 32, 18, zero=8, bits=4, pairs=True),
        Nibble32("Q4_1", 32, 20, bits=4, has_minimum=True, pairs=True),
        Nibble32("Q5_0", 32, 22, zero=16, bits=5, pairs=True),
        Nibble32("Q5_1", 32, 24, bits=5, has_minimum=True, pairs=True),
        Q8("Q8_0", 32, 34, zero=128, bits=8),
        Q2K("Q2_K", 256, 84, chunk=256, n_sub=4, bits=2, has_minimum=True, pairs=True),
        Q3K("Q3_K", 256, 110, chunk=256, n_sub=4, zero=4, bits=3, pairs=True),
        KNibble("Q4_K", 256, 144, chunk=256, bits=4, has_minimum=True, pairs=True),
        KNibble("Q5_K", 256, 176, chunk=256, bits=5, has_minimum=True, pairs=True),
        Q6K("Q6_K", 256, 210, chunk=256, n_sub=4, zero=32, bits=6, pairs=True),
        IQ4NL("IQ4_NL", 32, 18, zero=128, bits=8, pairs=True),
        IQ4XS("IQ4_XS", 256, 136, chunk=256, zero=128, bits=8, pairs=True),
        MXFP4("MXFP4", 32, 17, zero=16, bits=5, pairs=True),
    )
}


def format_of(fmt: str | Format) -> Format:
    """The format of a ggml type. Raises: KernelError: one that has no kernels."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise KernelError(f"there are no kernels for {fmt}", hint=f"expected one of {', '.join(FORMATS)}")
    return FORMATS[fmt]
