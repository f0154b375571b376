"""The paged KV cache as a pure policy: which blocks of positions belong to whom. Holds no memory, knows no device.

Source: PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vkllm.errors import CacheFullError


@dataclass
class BlockTable:
    """The blocks of one sequence: position p lies in block `blocks[p // block_size]`."""

    block_size: int
    blocks: list[int] = field(default_factory=list)

    def slot(self, position: int) -> int:
        """The cache row of `position`."""
        return self.blocks[position // self.block_size] * self.block_size + position % self.block_size


class BlockPool:
    """Free blocks, handed out lowest id first."""

    def __init__(self, n_block: int, block_size: int) -> None:
        self.block_size = block_size
        self.n_block = n_block
        self._free = list(range(n_block - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def extend(self, table: BlockTable, n_token: int) -> None:
        """Make `table` long enough for positions 0 … n_token - 1.

        Raises: CacheFullError: too few free blocks; nothing is reserved.
        """
        need = -(-n_token // self.block_size) - len(table.blocks)
        if need > self.n_free:
            raise CacheFullError(
                f"{n_token} tokens need {need} more KV-cache blocks; {self.n_free} are free",
                hint="raise n_ctx, or wait for a sequence to end",
            )
        table.blocks.extend(self._free.pop() for _ in range(max(need, 0)))

    def free(self, table: BlockTable) -> None:
        """Give all blocks of `table` back."""
        self._free.extend(reversed(table.blocks))
        table.blocks.clear()
