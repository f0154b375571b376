"""Attention over the paged cache: grouped heads, causal by length, online softmax in f32; no score leaves a register.

One workgroup serves all `group` query heads of one (row, KV head), so that K and V are read once. Positions 0 … length - 1 of
a row lie in blocks of `block_size` cache slots, named by its block table; a row's length counts only its own and earlier
positions, which is all that causality needs. A row of length 0 is padding: its output is zero. With a window a row sees only
its last positions, and what lies before is not read.

`direct(spec)` covers a row's whole length in one workgroup and writes the output. Where there are too few (row, KV head)
pairs to fill the device, `partial(spec)` gives `split` positions to a workgroup and `combine(spec)` merges. lavapipe has as
many workers as threads: with two, `direct` is right for any model of two KV heads or more, and saves a dispatch. A GPU that
decodes one long sequence wants the split.

Schedules ("lanes" is the subgroup size):
- "lane_row" (lavapipe): one subgroup a workgroup, texel reads, values pass between lanes by constant-lane shuffles and
  exchanges only. A lane owns 8 dims of queries, K and V; then a position's scores.
- "lane_chunk" (GPUs): several subgroups a workgroup, each with its own positions; queries in shared memory; 16-byte reads
  from storage buffers, neighbouring lanes reading neighbouring chunks of V; a reduction through shared memory at the end.

Files: `spec` the shapes, `rows` the cache in f16 and Q8_0, `softmax` the running state of a head, `result` where results go,
`lane_row` and `lane_chunk` the schedules, `kernels` the three kernels.

Sources: online softmax arXiv 1805.02867, FlashAttention arXiv 2205.14135, PagedAttention arXiv 2309.06180, logit soft caps
Gemma 2 arXiv 2408.00118, sinks arXiv 2309.17453 (here learned, as in gpt-oss).
"""

from vkllm_shaders.attention.kernels import combine, direct, partial
from vkllm_shaders.attention.spec import AttentionSpec, Cache, cache_row_nbytes

__all__ = ["AttentionSpec", "Cache", "cache_row_nbytes", "combine", "direct", "partial"]
