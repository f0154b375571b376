"""Which tokens of which sequences run in the next step. A pure policy: no device, no clock.

Every step is a list of chunks: one row for each sequence that decodes, then pieces of prompts. The rules:

- Decode rows come first, and beside them a step takes only `n_mixed` prompt rows: running streams keep their pace.
- The oldest prompt gets half of the prompt rows; the rest goes to the prompts that are nearest to their first token. So no prompt
  starves, and a short one does not wait behind a long one.
- A sequence is admitted, oldest first, when blocks for all its tokens are free, and one more for every running sequence. One
  whose beginning is just being computed for another waits for that and shares the blocks.
- When a running sequence needs a block and none is free, the youngest gives all of its blocks back and waits for its turn; its
  tokens are kept, and computed again later (as far as the prefix cache has forgotten them). The oldest always gets on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

from vkllm.errors import CacheFullError
from vkllm.kv_cache import BlockPool, BlockTable, block_names

_ticket = attrgetter("ticket")


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one stream, prompt first, and how far the cache has them. `ticket` is its place in the order of arrival."""

    token_ids: list[int]
    table: BlockTable
    ticket: int
    n_computed: int = 0
    n_cached: int = 0  # prompt tokens that were found in the cache when it was first admitted
    n_preempted: int = 0
    admitted: bool = False
    reuse: bool = True  # may it begin with blocks that another has computed?
    last_step: int = -1
    names: list[bytes] = field(default_factory=list)

    @property
    def n_pending(self) -> int:
        """Tokens that are known but not computed: one where it decodes, more where a prompt is to be read."""
        return len(self.token_ids) - self.n_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start … start + n_token - 1 of a sequence, for one step. `samples`: its last row gives the next token."""

    sequence: Sequence
    start: int
    n_token: int
    samples: bool


class Scheduler:
    """Plans steps over a pool of blocks. Use: `add`, then again and again `plan`, run it, `computed`, `append` or `remove`.

    `n_row`: most rows of a step; `n_seq`: most sequences that run at once; `n_mixed`: most prompt rows beside decode rows.
    """

    def __init__(self, pool: BlockPool, *, n_row: int, n_seq: int, n_mixed: int | None = None) -> None:
        self.pool, self.n_row, self.n_seq = pool, n_row, n_seq
        self.n_mixed = n_mixed or max(1, n_row // 2)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self._tickets = count()
        self._n_step = 0

    @property
    def n_token_max(self) -> int:
        """The longest sequence that the pool can hold."""
        return self.pool.n_block * self.pool.block_size

    def add(self, token_ids: Iterable[int], *, reuse: bool = True) -> Sequence:
        """Queue a sequence. Without `reuse` every token of it is computed.

        Raises: CacheFullError: its tokens will never fit.
        """
        ids = list(token_ids)
        if len(ids) > self.n_token_max:
            raise CacheFullError(f"{len(ids)} tokens do not fit the cache of {self.n_token_max}", hint="raise the cache's size")
        sequence = Sequence(ids, BlockTable(self.pool.block_size), next(self._tickets), reuse=reuse)
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, finished or not: its blocks are free at once. Does nothing where it has ended already."""
        for group in (self.running, self.waiting):
            if sequence in group:
                group.remove(sequence)
        self.pool.free(sequence.table)

    def plan(self, limit: int | None = None) -> list[Chunk]:
        """The next step, empty where nothing can run. `limit`: fewer rows than `n_row`, at least one."""
        self._n_step += 1
        n_row = max(1, min(self.n_row, limit or self.n_row))
        prompts = bool(self.waiting) or any(s.n_pending > 1 for s in self.running)
        kept = (n_row // 4 or self._n_step % 2) if prompts else 0  # rows that decoding leaves to prompts
        decoding = self._decode_rows(n_row, kept)
        self._admit()
        decoding = [c for c in decoding if c.sequence in self.running]
        n_left = n_row - len(decoding)
        chunks = decoding + self._prompt_rows(min(n_left, self.n_mixed) if decoding else n_left)
        chunks = chunks or self._decode_rows(n_row, 0)  # nothing wanted the rows that were kept
        for chunk in chunks:
            chunk.sequence.last_step = self._n_step
        return chunks

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """A step has run: its positions are in the cache, and full blocks can be shared."""
        for chunk in chunks:
            s, size = chunk.sequence, self.pool.block_size
            s.n_computed += chunk.n_token
            if s.n_computed // size > len(s.names):
                s.names = block_names(s.token_ids[: s.n_computed], size, s.names)
            for i in range(chunk.start // size, s.n_computed // size):
                self.pool.publish(s.table.blocks[i], s.names[i])

    def reserve(self, sequence: Sequence, n_token: int) -> int:
        """Places for drafted tokens after the row of a planned step. Nobody gives way for them, and everybody who runs finds a
        block left. Returns for how many of the `n_token` there are some."""
        table, size = sequence.table, self.pool.block_size
        n_block = self.pool.n_block_for(sequence.n_computed + 1 + n_token) - len(table.blocks)
        if n_block > 0 and self.pool.n_free - n_block >= len(self.running):
            self.pool.extend(table, sequence.n_computed + 1 + n_token)
        return min(n_token, len(table.blocks) * size - sequence.n_computed - 1)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """The next token of a sequence, which must still fit the pool."""
        assert len(sequence.token_ids) < self.n_token_max
        sequence.token_ids.append(token_id)

    def restart(self) -> None:
        """The cache is lost: everything that ran waits again, and is computed anew."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.pool.forget()

    def _decode_rows(self, n_row: int, kept: int) -> list[Chunk]:
        """A row for each sequence that decodes, those first that have waited longest; makes room for them."""
        decoding = [s for s in self.running if s.n_pending == 1]
        if len(decoding) > n_row - kept:
            decoding = sorted(sorted(decoding, key=attrgetter("last_step"))[: n_row - kept], key=_ticket)
        chosen = [s for s in decoding if s in self.running and self._grow(s)]
        return [Chunk(s, s.n_computed, 1, samples=True) for s in chosen if s in self.running]

    def _grow(self, sequence: Sequence) -> bool:
        """A place for the next token. Preempts the youngest until there is one; False where that is the sequence itself."""
        while True:
            try:
                self.pool.extend(sequence.table, sequence.n_computed + 1)
                return True
            except CacheFullError:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.table)
        sequence.n_computed = 0
        sequence.n_preempted += 1
        self.n_preempted += 1
        insort(self.waiting, sequence, key=_ticket)

    def _admit(self) -> None:
        """Move sequences from waiting to running, as long as blocks and places last."""
        pool, size = self.pool, self.pool.block_size
        coming = {name for s in self.running if s.n_pending > 1 for name in s.names[s.n_computed // size :]}
        for s in list(self.waiting):
            if len(self.running) >= self.n_seq:
                return
            s.names = block_names(s.token_ids, size, s.names)
            names = (
                s.names[: (len(s.token_ids) - 1) // size] if s.reuse else []
            )  # the last token is computed in any case: it gives the logits
            shared = pool.find(names)
            if len(shared) < len(names) and names[len(shared)] in coming:
                continue
            need = pool.n_block_for(len(s.token_ids)) - len(shared)
            if need + len(self.running) > pool.n_free_without(shared):
                return
            pool.share(s.table, shared)
            pool.extend(s.table, len(s.token_ids))
            s.n_computed = len(shared) * size
            s.n_cached, s.admitted = s.n_cached if s.admitted else s.n_computed, True
            self.waiting.remove(s)
            insort(self.running, s, key=_ticket)
            coming.update(names[len(shared) :])

    def _prompt_rows(self, n_row: int) -> list[Chunk]:
        """Share the rows among the prompts that are being read."""
        prompts = [s for s in self.running if s.n_pending > 1]
        if not prompts or n_row < 1:
            return []
        oldest, *others = prompts
        rows = {oldest: min(oldest.n_pending, n_row if not others else -(-n_row // 2))}
        left = n_row - rows[oldest]
        for s in sorted(others, key=attrgetter("n_pending")):
            rows[s] = min(s.n_pending, left)
            left -= rows[s]
        rows[oldest] += min(oldest.n_pending - rows[oldest], left)
        return [Chunk(s, s.n_computed, n, samples=n == s.n_pending) for s, n in rows.items() if n]
