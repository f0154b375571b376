"""The shape and the schedule of an attention kernel, and the layout of a cache row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from vkllm_codegen.errors import KernelError
from vkllm_shaders.records import GROUP, LANES

Cache = Literal["f16", "q8_0"]

SCALE_DIMS = 32
"""Dims of a Q8_0 row that share a scale."""


def scale_texels(head_dim: int, cache: Cache) -> int:
    """16-byte texels of f32 scales that a cache row begins with: one scale for 32 dims in Q8_0, none in f16."""
    return -(-head_dim // (4 * SCALE_DIMS)) if cache == "q8_0" else 0


def cache_row_nbytes(head_dim: int, cache: Cache) -> int:
    """Bytes of one (slot, KV head) row of keys or values.

    "f16": head_dim halves. "q8_0": the f32 scales, padded with zeros to whole texels, then head_dim signed bytes.
    Raises: KernelError: the cache cannot hold heads of this size.
    """
    if cache == "q8_0" and head_dim % SCALE_DIMS:
        raise KernelError(
            f"a Q8_0 cache for heads of {head_dim} dims", hint="head_dim must be a multiple of 32; use an f16 cache"
        )
    return 2 * head_dim if cache == "f16" else 16 * scale_texels(head_dim, cache) + head_dim


@dataclass(frozen=True)
class AttentionSpec:
    """The shape and the schedule of one attention kernel; every field makes a new module.

    head_dim: a multiple of 8; group: query heads a KV head; block_size: cache slots a block; lanes: subgroup size;
    split: positions a workgroup of `partial`; tile: positions a turn of lane_row, a multiple of lanes (0: lanes; with twice as
    many a group of 7 runs 15 % faster on lavapipe, after twice the compile time); subgroups: a workgroup of lane_chunk.
    cache: how K and V are kept; scale: of the scores (None: 1 / sqrt(head_dim)); softcap (0: none): scores become
    softcap * tanh(score / softcap); windowed: the push constant `window` bounds how far back a row sees; sinks: a logit for
    each head, which takes part in the softmax but has no value. records: `direct` also writes its rows in 8 bits (records.py);
    only in lane_row with 8 lanes, for heads of whole groups.
    """

    head_dim: int
    group: int
    block_size: int = 32
    lanes: int = 8
    split: int = 512
    schedule: Literal["lane_row", "lane_chunk"] = "lane_row"
    tile: int = 0
    subgroups: int = 4
    cache: Cache = "f16"
    scale: float | None = None
    softcap: float = 0.0
    windowed: bool = False
    sinks: bool = False
    records: bool = False

    def __post_init__(self) -> None:
        if self.head_dim % 8 or self.head_dim <= 0 or self.group <= 0:
            raise KernelError(
                f"attention of head_dim {self.head_dim}, group {self.group}", hint="head_dim must be a multiple of 8"
            )
        cache_row_nbytes(self.head_dim, self.cache)  # raises where the cache cannot hold them
        if self.split % max(self.turn, self.block_size) or self.turn % self.lanes:
            raise KernelError(
                f"attention with split {self.split}, block_size {self.block_size}, tile {self.turn}, lanes {self.lanes}",
                hint="split must be a multiple of block_size and of tile, tile a multiple of lanes",
            )
        if not (self.softcap >= 0.0 and math.isfinite(self.softcap)):
            raise KernelError(f"attention with a softcap of {self.softcap}", hint="expected a positive number, or 0 for none")
        if self.records and (self.schedule != "lane_row" or self.lanes != LANES or self.head_dim % GROUP):
            raise KernelError(
                f"attention that writes records by {self.schedule} of {self.lanes} lanes, heads of {self.head_dim} dims",
                hint=f"expected lane_row of {LANES} lanes, head_dim a multiple of {GROUP}",
            )

    @property
    def turn(self) -> int:
        """Positions a subgroup takes at a time."""
        return self.tile or self.lanes

    @property
    def chunks(self) -> int:
        """Chunks of 8 dims (16 bytes in f16) of one K or V row."""
        return self.head_dim // 8

    @property
    def row_texels(self) -> int:
        """16-byte texels of one K or V row."""
        return cache_row_nbytes(self.head_dim, self.cache) // 16

    @property
    def score_scale(self) -> float:
        """What q · k is multiplied with."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def name(self) -> str:
        """The part of kernel names that tells the specs apart."""
        shape = f"d{self.head_dim}_g{self.group}_b{self.block_size}_s{self.lanes}_t{self.turn}_p{self.split}"
        parts = [self.schedule, shape] + ([f"n{self.subgroups}"] if self.schedule == "lane_chunk" else [])
        parts += ["q8"] if self.cache == "q8_0" else []
        parts += [] if self.scale is None else [f"scale{self.scale:.9g}"]
        parts += [f"cap{self.softcap:.9g}"] if self.softcap else []
        return "_".join(parts + [word for word in ("windowed", "sinks", "records") if getattr(self, word)])

    @property
    def invocations(self) -> int:
        """The workgroup size of `direct` and `partial`."""
        return self.lanes * (self.subgroups if self.schedule == "lane_chunk" else 1)

    @property
    def shared_nbytes(self) -> int:
        """Shared memory of a workgroup: the queries, and every subgroup's state and values."""
        floats = self.group * self.head_dim + self.subgroups * self.group * (self.head_dim + 2)
        return 4 * floats if self.schedule == "lane_chunk" else 0

    def fitted(self, max_shared_bytes: int, max_invocations: int) -> AttentionSpec:
        """The same with as many subgroups a workgroup as a device's limits allow, 8 at most.

        Raises: KernelError: not even one fits.
        """
        for subgroups in (8, 4, 2, 1):
            spec = replace(self, subgroups=subgroups)
            if spec.shared_nbytes <= max_shared_bytes and spec.invocations <= max_invocations:
                return spec
        least = replace(self, subgroups=1).shared_nbytes
        raise KernelError(
            f"attention, {self.group} heads of {self.head_dim}, needs {least} bytes of shared memory of {max_shared_bytes}",
            hint='use schedule="lane_row", which needs none',
        )

    def n_split(self, n_position: int) -> int:
        """Workgroups of `partial` a (row, KV head) that cover `n_position` positions."""
        return -(-n_position // self.split)

    def scratch_nbytes(self, n_row: int, n_kv_head: int, n_split: int) -> int:
        """Size of the partial results, f32 [n_row, n_kv_head, n_split, group, 2 + head_dim]: (max, sum, weighted values)."""
        return 4 * n_row * n_kv_head * n_split * self.group * (2 + self.head_dim)
