"""Weight formats: how ggml's blocks are packed for the kernels, and how a kernel reads them back.

A file's blocks (18, 22, 34, 176, 210 bytes …) cannot be loaded 16 bytes at a time. `pack` rearranges them, once, into texels of
16 bytes (u32x4) without changing a bit of information; the size grows only by what padding needs.

Words. A row group is `lanes * rows` rows. A *chunk* is 64 weights (256 for K-quants) of the `rows` rows of one lane; it has
`n_head` texels and `steps` times `n_body` texels; a *step* is 64 weights of each row. The 64 weights of a step belong to 16
*slots* of four, so that a slot is one texel of x; `Format.texel` tells which (ggml's nibble order is kept).

In the formats of 4, 5 and 6 bits a word holds two rows: 16 bits of row 2i below 16 bits of row 2i + 1. A *quad* is such a word
with one weight a byte: [row 2i, weight k], [2i, k + 1], [2i + 1, k], [2i + 1, k + 1]. The f32 kernels mask a byte and convert
it without a shift (its power of two goes into the scale), the int8 kernels multiply two rows at a time.

Layouts:
- "lane_row" (lavapipe): texel ((group * n_chunk + chunk) * n_texel + j) * lanes + lane.
  Packed row (group * rows + r) * lanes + lane.
- "lane_pair" (lavapipe, activations in 8 bits): see coded.py.
- "lane_chunk" (GPUs; lanes = 1): a group holds its head texels [n_head, n_chunk], then its body texels
  [n_body, n_chunk * steps], so that neighbouring invocations, one a step, read neighbouring texels. Packed row group * rows + r.

This module does not know what is multiplied with what; see matmul.py.
Source of the block structures: ggml's quantization formats as gguf.quants dequantizes them.
"""

from vkllm_shaders.formats.base import SLOTS, STEP, Format, StepWeights
from vkllm_shaders.formats.coded import CODED, FIELDS, STEP_COLUMNS, Coded, CodedWeights, code_order, coded_of
from vkllm_shaders.formats.layout import Layout
from vkllm_shaders.formats.orders import pack_vector, row_order
from vkllm_shaders.formats.packing import pack, packed_nbytes, packed_shape
from vkllm_shaders.formats.table import FORMATS, format_of

__all__ = [
    "CODED",
    "FIELDS",
    "FORMATS",
    "SLOTS",
    "STEP",
    "STEP_COLUMNS",
    "Coded",
    "CodedWeights",
    "Format",
    "Layout",
    "StepWeights",
    "code_order",
    "coded_of",
    "format_of",
    "pack",
    "pack_vector",
    "packed_nbytes",
    "packed_shape",
    "row_order",
]
