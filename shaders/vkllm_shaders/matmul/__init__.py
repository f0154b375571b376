"""Weights times activations, matvec and GEMM in one: every format of formats, with the work around the product fused in.

    y[t, row] = epilogue(sum_k weight[row, k] * norm(x)[t, k] + bias[row])

`matmul(spec)` makes the kernel for a `tile` of tokens. The schedules differ in where a lane's weights and x come from and in who
adds up:
- "lane_row" (lavapipe): one subgroup a workgroup; a lane owns `rows` rows and walks along them; each slot of x (one texel)
  lies in one lane and reaches the others by a shuffle from a constant lane. No reduction over lanes, no shared memory.
- "lane_pair" (lavapipe, activations="int8"): like lane_row, on weights as codes (formats/coded.py) and x as records
  (records.py): products and their sums are integers, scaled a group of weights at a time.
- "lane_chunk" (GPUs): a subgroup owns `rows` rows; lane after lane takes a step of 64 weights, reads its own x, and the lanes
  are added at the end. `subgroups` subgroups a workgroup, each with its own rows.

Arithmetic. One or two tokens on lavapipe: products of raw numbers are added up within a block and scaled once (zero points and
minimums by the block's sum of x). Else a weight is dequantized once and multiplied with every token's x.
activations="int8" in lane_chunk: x is rounded to 8 bits with a scale for each 32 values (GROUP slots of a step), products and
their sums are integers, scaled a block at a time; F32, F16 and BF16 weights have no blocks and keep f32.
RMSNorm needs no pass of its own: sum(x²) is gathered in the same loop and scales the result.

Source: KERNELS.md's measurements and those in bench/LOG.md.

Files: `spec` the shapes, `body` loops and arithmetic, `activations` x, `integers` both for lane_pair, `epilogue` what follows,
`kernels` the kernels.
"""

from vkllm_shaders.matmul.kernels import OWN_BINDINGS, OWN_PUSH, alike, matmul, matmul_pair, pair_groups
from vkllm_shaders.matmul.spec import ALIGN_COLUMNS, Epilogue, MatmulSpec, push_constants

__all__ = [
    "ALIGN_COLUMNS",
    "OWN_BINDINGS",
    "OWN_PUSH",
    "Epilogue",
    "MatmulSpec",
    "alike",
    "matmul",
    "matmul_pair",
    "pair_groups",
    "push_constants",
]
