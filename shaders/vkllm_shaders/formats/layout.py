"""Where packed texels lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vkllm_codegen.errors import KernelError


@dataclass(frozen=True, slots=True)
class Layout:
    """Where packed texels lie.

    lanes: rows side by side (the subgroup size for lane_row, 8 for lane_pair, 1 for lane_chunk); rows: a lane's (lane_pair: 4).
    """

    kind: Literal["lane_row", "lane_pair", "lane_chunk"] = "lane_row"
    lanes: int = 8
    rows: int = 4

    def __post_init__(self) -> None:
        if self.rows not in (2, 4, 8) or self.lanes < 1 or (self.kind == "lane_chunk" and self.lanes != 1):
            raise KernelError(f"layout {self}", hint="rows must be 2, 4 or 8; lane_chunk has lanes = 1")
        if self.kind == "lane_pair" and (self.lanes, self.rows) != (8, 4):
            raise KernelError(f"layout {self}", hint="lane_pair has 8 lanes of 4 rows")

    @property
    def group_rows(self) -> int:
        """Rows of a row group."""
        return self.lanes * self.rows

    def n_group(self, n_row: int) -> int:
        """Row groups that hold `n_row` rows."""
        return -(-n_row // self.group_rows)
