"""The paged KV cache as a pure policy: which blocks of positions belong to whom. Holds no memory, knows no device.

Blocks are shared whole, by reference count. A sequence only writes to the last blocks of its table, which nobody else has, and a
full block never changes, so copy on write comes down to computing a partial block again: nothing is ever copied.
A full block can be named by the hash of all tokens up to its end; it stays findable after its last owner has gone, until its
memory is needed: least recently used first.

Source: PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import CacheFullError


@dataclass
class BlockTable:
    """The blocks of one sequence: position p lies in block `blocks[p // block_size]`."""

    block_size: int
    blocks: list[int] = field(default_factory=list)

    def slot(self, position: int) -> int:
        """The cache row of `position`."""
        return self.blocks[position // self.block_size] * self.block_size + position % self.block_size


def first_rows(slots: NDArray[np.uint32], block_size: int, n_kv_head: int) -> NDArray[np.uint32]:
    """Where the cache [n_block, n_kv_head, block_size] keeps slots, u32 of any shape: the rows of KV head 0."""
    return slots + slots // block_size * np.uint32((n_kv_head - 1) * block_size)


class BlockPool:
    """All blocks: free ones, handed out lowest id first; owned ones, with a count of owners; and idle ones, whose owners have
    gone but whose contents can still be found. Idle blocks count as free."""

    def __init__(self, n_block: int, block_size: int) -> None:
        self.block_size = block_size
        self.n_block = n_block
        self._free = list(range(n_block - 1, -1, -1))
        self._n_owner = [0] * n_block
        self._name_of: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def n_free(self) -> int:
        """Blocks that can be had: free and idle."""
        return len(self._free) + len(self._idle)

    @property
    def n_idle(self) -> int:
        """Blocks that nobody owns, but that the prefix cache can still find."""
        return len(self._idle)

    def n_block_for(self, n_token: int) -> int:
        """Blocks that hold `n_token` positions."""
        return -(-n_token // self.block_size)

    def extend(self, table: BlockTable, n_token: int) -> None:
        """Make `table` long enough for positions 0 … n_token - 1.

        Raises: CacheFullError: too few free blocks; nothing is reserved.
        """
        need = self.n_block_for(n_token) - len(table.blocks)
        if need > self.n_free:
            raise CacheFullError(
                f"{n_token} tokens need {need} more KV-cache blocks; {self.n_free} are free",
                hint="raise n_ctx, or wait for a sequence to end",
            )
        table.blocks.extend(self._take() for _ in range(max(need, 0)))

    def free(self, table: BlockTable) -> None:
        """Give all blocks of `table` back. The end of a sequence is forgotten before its beginning, which others may share."""
        for block in reversed(table.blocks):
            self._n_owner[block] -= 1
            if not self._n_owner[block]:
                if block in self._name_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.blocks.clear()

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks with the longest run of `names` (from `block_names`) that the cache holds."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def n_free_without(self, blocks: Sequence[int]) -> int:
        """How many blocks would be free if `blocks` were owned."""
        return self.n_free - sum(block in self._idle for block in blocks)

    def share(self, table: BlockTable, blocks: Sequence[int]) -> None:
        """Begin the empty `table` with blocks that `find` gave: one owner more for each."""
        assert not table.blocks, "only the beginning of a sequence is shared"
        for block in blocks:
            self._idle.pop(block, None)
            self._n_owner[block] += 1
        table.blocks.extend(blocks)

    def publish(self, block: int, name: bytes) -> None:
        """Let `find` know a full, computed block. Where another block has that name already, it keeps it."""
        if name not in self._named and block not in self._name_of:
            self._named[name], self._name_of[block] = block, name

    def forget(self) -> None:
        """Drop all names: the contents of the cache are lost, or must not be reused."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._named.clear()
        self._name_of.clear()

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._name_of.pop(block)]
        self._n_owner[block] = 1
        return block


def block_names(token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A name for each full block: a hash of its tokens and all before them, 16 bytes each. `known`: the first ones, if had."""
    names = list(known)
    for start in range(len(names) * block_size, len(token_ids) - block_size + 1, block_size):
        part = np.asarray(token_ids[start : start + block_size], np.uint32).tobytes()
        names.append(hashlib.blake2b(part, digest_size=16, key=names[-1] if names else b"").digest())
    return names
