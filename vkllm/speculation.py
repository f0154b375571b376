"""Speculative decoding by prompt lookup: what was said once is likely to be said again. A pure policy: no device, no clock.

A draft is the tokens that followed the last occurrence of the longest suffix (4, 3 or 2 tokens) of prompt and completion. An
engine runs a sequence's last token and its draft as the rows of one step, chooses a token from each row in order, as it would
without, and stops at the first that is not the drafted one. So every token comes from the logits after the tokens before it,
with one draw of the request's own random stream, and a draft changes only how many steps that takes.

That holds to the bit only where a row's logits do not depend on the rows beside it. Kernels for more rows may add in another
order; int8 activations and an f16 cache make more of that than a last bit, and a near tie may turn. (On CPUs with int8, sums are
of whole numbers, and any number of rows gives the same bits.) So "auto" uses only sizes of steps that the engine has compared,
row by row and bit by bit, with steps of one row. A fixed length is used unchecked: its tokens are as good as those of prompts,
which are read in many rows, but need not be the same.

It pays where (1 + the drafted tokens that are likely to be right) outweighs what more rows cost. The first is learned in each
request by the length of the match, also while nothing is drafted: the next token tells whether a draft would have been right. The
second is learned from the times of steps that the engine reports.

Sources: prompt lookup, arXiv 2304.04487; expected tokens of a draft, arXiv 2211.17192.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vkllm.config import MAX_DRAFT, Speculate

SUFFIXES = (4, 3, 2)
"""Lengths of the runs of tokens that are looked up, longest first. One equal token is no evidence."""

LONGEST = 16  # matches are followed back so far: a longer one is not more reliable
N_SLOT = 1 << 16  # of the table of runs: 256 KiB a request; of two runs in one slot the later is found

PRIOR = ((0.5, 1.5), (1.0, 2.0), (1.0, 1.5), (1.5, 1.0), (2.0, 0.7), (3.0, 0.5))
"""Right and wrong drafted tokens to begin with, for matches of 2, 3, 4, up to 8, up to 15 and LONGEST tokens."""

MEMORY = 0.95  # of what was learned, with each drafted token more: about the last 20 count
ROW_COST = 0.3  # of a step of one row, for each row more, where nothing has been measured
RATE = 0.1  # of an average of step times
RETURN = 1 / 200  # how fast a time that is not measured any more goes back to what is expected without measuring
GAIN = 1.05  # times as many tokens per second, or nothing is drafted
FIRST_STEPS = 8  # what the first step of a size costs: it is recorded and checked, and kernels may be compiled


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place of the history's end: what followed begins at `start`, and `length` tokens before it are equal."""

    start: int
    length: int


class History:
    """The tokens of one sequence, and where each short run of them stood last. A constant time a token, whatever the length."""

    def __init__(self, token_ids: Iterable[int] = (), n_slot: int = N_SLOT) -> None:
        self.token_ids: list[int] = []
        self._starts = array("i", [-1]) * n_slot
        for token in token_ids:
            self.push(token)

    def push(self, token_id: int) -> None:
        """The next token. The runs that it follows can be found from now on."""
        ids = self.token_ids
        for n in SUFFIXES:
            if len(ids) >= n:
                self._starts[self.slot(ids[-n:])] = len(ids)
        ids.append(token_id)

    def match(self) -> Match | None:
        """The last earlier occurrence of the longest suffix."""
        for n in SUFFIXES:
            if len(self.token_ids) > n:
                start = self._starts[self.slot(self.token_ids[-n:])]
                length = self._n_equal(start) if start > 0 else 0
                if length >= n:  # else another run of tokens has that slot
                    return Match(start, length)
        return None

    def draft(self, match: Match, n: int) -> list[int]:
        """The `n` tokens that followed; where the history ends before, it is a loop, and the draft goes round once more."""
        period = len(self.token_ids) - match.start
        return [self.token_ids[match.start + i % period] for i in range(n)]

    def slot(self, run: Sequence[int]) -> int:
        """Where the table keeps the start of what followed this run of tokens."""
        return hash(tuple(run)) % len(self._starts)

    def _n_equal(self, start: int) -> int:
        """How many tokens before `start` equal the last ones."""
        ids, n = self.token_ids, 0
        while n < min(start, LONGEST) and ids[start - 1 - n] == ids[-1 - n]:
            n += 1
        return n


class Chances:
    """How likely the next drafted token is right, by the length of the match."""

    def __init__(self) -> None:
        self._counts = [list(counts) for counts in PRIOR]

    def of(self, length: int) -> float:
        """Between 0 and 1, for a match of `length` tokens."""
        right, wrong = self._counts[_kind(length)]
        return right / (right + wrong)

    def learn(self, length: int, right: bool) -> None:
        """A drafted token, all before which were right, was right or wrong. A part of the prior is never forgotten."""
        counts, prior = self._counts[_kind(length)], PRIOR[_kind(length)]
        for i, one in enumerate((right, not right)):
            counts[i] = MEMORY * counts[i] + one + (1.0 - MEMORY) * 0.5 * prior[i]


def _kind(length: int) -> int:
    """The entry of PRIOR for matches of that length."""
    return length - 2 if length <= 4 else 3 if length <= 8 else 4 if length < LONGEST else 5


class Speculator:
    """The drafts of one request. Before each step ask for `chance` and `draft`; `push` every token that is chosen."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._history, self._chances = History(token_ids), Chances()
        self._match = self._history.match()
        self._expected: deque[int] = deque()
        self._length = 0  # of the match from which they come

    @property
    def chance(self) -> float:
        """How likely the first drafted token is right; 0 where there is nothing to draft."""
        return self._chances.of(self._match.length) if self._match else 0.0

    def draft(self, n: int) -> list[int]:
        """The next `n` tokens, if all goes as before. With n = 0 it only looks whether one would have been right."""
        self._expected.clear()
        if self._match is None:
            return []
        draft = self._history.draft(self._match, max(n, 1))
        self._expected.extend(draft)
        self._length = self._match.length
        return draft[:n]

    def push(self, token_id: int) -> None:
        """The token that was chosen next."""
        if self._expected:
            right = self._expected.popleft() == token_id
            self._chances.learn(self._length, right)
            if not right:
                self._expected.clear()
        self._history.push(token_id)
        self._match = self._history.match()


class StepCosts:
    """How long a step of so many rows takes, by sizes 1, 2, 4, 8, …: exponential averages of what the engine measured."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._used: set[int] = set()

    def observe(self, n_row: int, seconds: float) -> None:
        """A step of `n_row` rows took so long. The first of a size does not count; one far too long counts as twice as long."""
        size = size_of(n_row)
        if size not in self._used or seconds <= 0.0:
            self._used.add(size)
            return
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + RATE * (min(seconds, 2.0 * known) - known)
        for other in self._seconds.keys() - {size} if size == 1 else ():
            expected = _expected_cost(other) * self._seconds[size]
            self._seconds[other] += RETURN * (expected - self._seconds[other])

    def ratio(self, n_row: int, n_base: int) -> float:
        """The time of a step of `n_row` rows by that of one of `n_base`."""
        a, b = size_of(n_row), size_of(n_base)
        if a in self._seconds and b in self._seconds:
            return self._seconds[a] / self._seconds[b]
        return _expected_cost(a) / _expected_cost(b)


def size_of(n_row: int) -> int:
    """The recording that holds so many rows."""
    return 1 << (n_row - 1).bit_length()


def _expected_cost(size: int) -> float:
    return 1.0 + ROW_COST * (size - 1)


@dataclass(frozen=True, slots=True)
class Bid:
    """What a sequence can do with a draft: the chance that its next token is right, and how many tokens it has room for."""

    chance: float
    room: int


class DraftPlanner:
    """How many tokens to draft in each step, for all sequences of an engine; `mode` as RuntimeConfig's `speculate`.

    `n_row`: most rows of a step with drafts.
    """

    def __init__(self, mode: Speculate, n_row: int) -> None:
        self.mode, self.n_row = mode, min(n_row, MAX_DRAFT + 1)
        self.costs = StepCosts()
        self._exact: dict[int, bool] = {1: True}

    @property
    def on(self) -> bool:
        """May anything ever be drafted?"""
        return self.mode != "off" and self.n_row > 1

    def unchecked(self, n_row: int) -> bool:
        """Must a step of so many rows be compared with steps of one?"""
        return self.mode == "auto" and size_of(n_row) not in self._exact

    def checked(self, n_row: int, equal: bool) -> None:
        """What came of that. Where a size differs, larger ones are not tried."""
        self._exact[size_of(n_row)] = equal
        if not equal:
            self.n_row = size_of(n_row) // 2

    def lengths(self, bids: Sequence[Bid], limit: int | None = None) -> list[int]:
        """How many tokens to draft for each sequence of a step in which all of them decode. `limit`: fewer rows than `n_row`."""
        n_row = min(self.n_row, limit or self.n_row)
        if not self.on or not any(b.chance > 0.0 and b.room > 0 for b in bids):
            return [0] * len(bids)
        return self._best(bids, n_row) if self.mode == "auto" else _fixed(bids, int(self.mode), n_row)

    def _best(self, bids: Sequence[Bid], n_row: int) -> list[int]:
        """The lengths with the most tokens by time. Row after row goes to the sequence where it is likeliest to give a token."""
        lengths, tokens = [0] * len(bids), float(len(bids))
        best, best_rate = list(lengths), GAIN
        gains = [b.chance if b.room > 0 else 0.0 for b in bids]
        for n in range(len(bids) + 1, n_row + 1):
            i = max(range(len(bids)), key=gains.__getitem__)
            if gains[i] <= 0.0:
                break
            lengths[i] += 1
            tokens += gains[i]
            gains[i] = gains[i] * bids[i].chance if lengths[i] < bids[i].room else 0.0
            rate = tokens / len(bids) / self.costs.ratio(n, len(bids))
            if rate > best_rate and self._may_try(n, rate, bids):
                best, best_rate = list(lengths), rate
        return best

    def _may_try(self, n_row: int, rate: float, bids: Sequence[Bid]) -> bool:
        """Is that size known to be right? If not, one sequence alone may try it, after all smaller ones, with so many tokens to
        come that what the first time costs is saved."""
        size = size_of(n_row)
        if size in self._exact:
            return self._exact[size]
        return len(bids) == 1 and size // 2 in self._exact and bids[0].room * (1.0 - 1.0 / rate) > FIRST_STEPS


def _fixed(bids: Sequence[Bid], length: int, n_row: int) -> list[int]:
    """`length` tokens for whoever has a match, first come, first served."""
    lengths, left = [], max(n_row - len(bids), 0)
    for bid in bids:
        lengths.append(min(length, bid.room, left) if bid.chance > 0.0 else 0)
        left -= lengths[-1]
    return lengths
