"""What the packer of layout "lane_pair" writes: ggml's rows → the words of coded.py.

A lane's two pairs of rows lie word by word in turn, so two words are a number of 64 bits, a *unit*, and each of the four rows has
16 bits of it, as in the planes of codes.py. Units are made plane by plane; only the last copy brings them to their lanes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vkllm_shaders.formats.coded import PAIR_LANES, PAIR_ROWS, STEP_COLUMNS, Coded, code_order
from vkllm_shaders.formats.codes import BLOCKS, HALVES, U64, Unpacked, add_moved, moved
from vkllm_shaders.formats.scratch import scratch
from vkllm_shaders.formats.table import format_of

U8 = NDArray[np.uint8]

LOW_BYTES = 0xFF * HALVES


def pack_codes(coded: Coded, rows: U8, n_col: int, out: U8) -> None:
    """Pack some whole groups: u8 [group, row, lane, row_bytes] as in the file → units [group, chunk, texel, lane, 2]."""
    g, n_chunk, block = len(rows), coded.n_chunk(n_col), format_of(coded.name).block
    found = BLOCKS[coded.name](_planes(rows, n_chunk, coded.chunk // block, n_col // block))
    if n_col % coded.chunk:  # steps past the end are zeros
        found.codes[n_col % coded.chunk // STEP_COLUMNS :, ..., n_chunk - 1 :: n_chunk] = 0
    outer = found.codes.shape[2:]
    units = scratch("units", (2 * coded.n_texel, *outer))
    units.fill(0)
    head, body = units[: 2 * coded.n_head], units[2 * coded.n_head :].reshape(coded.steps, 2 * coded.n_body, *outer)
    if coded.carries:
        _put_codes(coded, found.codes, body[:, 2:])
        _put_carried(found, body, n_chunk)
    else:
        _put_codes(coded, found.codes, body)
        _put_scales(coded, found, head, body)
    texels = out.view(np.uint64).reshape(g, n_chunk, coded.n_texel, PAIR_LANES, 2)
    for i in range(2):
        texels[..., i] = units[i::2].reshape(-1, PAIR_LANES, g, n_chunk).transpose(2, 3, 0, 1)


def _planes(rows: U8, n_chunk: int, n_block: int, used: int) -> U64:
    """Rows of `used` blocks → planes [block of a chunk, u16 of a block, lane, chunk], with blocks of zeros at the end."""
    halves = rows.view(np.uint16)  # [group, row, lane, …]
    n_half = halves.shape[3] // used
    beside = scratch("beside", (PAIR_LANES, len(rows), n_chunk * n_block * n_half, PAIR_ROWS), np.uint16)
    beside[:, :, halves.shape[3] :] = 0
    for r in range(PAIR_ROWS):
        beside[:, :, : halves.shape[3], r] = halves[:, r].swapaxes(0, 1)
    chunks = beside.view(np.uint64).reshape(-1, n_block * n_half)
    planes = scratch("planes", chunks.shape[::-1])
    planes[...] = chunks.T
    return planes.reshape(n_block, n_half, PAIR_LANES, -1)


def _put_codes(coded: Coded, codes: U64, body: U64) -> None:
    """codes [step, 16, lane, chunk] → body [step, unit, lane, chunk], zero before."""
    steps, outer = coded.steps, codes.shape[2:]
    order = code_order(coded.group)
    # 1. Columns (4 m + q, 4 m + q + 1), q even, in the order in which a lane meets them.
    source = [(2 * (lane ^ j) + q // 2) * PAIR_LANES + lane for q, j in order if q % 2 == 0 for lane in range(PAIR_LANES)]
    by_lane = codes.reshape(steps, -1, outer[1])
    pairs = by_lane.take(source, axis=1, out=scratch("pairs", by_lane.shape), mode="clip")
    # 2. One column in 16 bits.
    pairs = pairs.reshape(steps, 2 * coded.n_sub, -1, *outer)
    fields = scratch("fields", (steps, 2 * coded.n_sub, 2, *pairs.shape[2:]))
    moved(pairs, 0, LOW_BYTES, fields[:, :, 0])
    moved(pairs, -8, LOW_BYTES, fields[:, :, 1])
    # 3. As many as fit.
    if coded.bits == 6:
        c, triples = fields.reshape(steps, 4, 8, *outer), body.reshape(steps, 4, 3, *outer)
        c[:, :, 1:6:2] <<= 6
        np.bitwise_or(c[:, :, 0:6:2], c[:, :, 1:6:2], out=triples)
        for k in range(2):
            add_moved(triples[:, :, k], c[:, :, 6 + k], 12, 15 * HALVES << 12)
            add_moved(triples[:, :, 2], c[:, :, 6 + k], 8 + 2 * k, 48 * HALVES << (8 + 2 * k))
        return
    fields, per_word = fields.reshape(steps, STEP_COLUMNS, *outer), 16 // coded.bits
    body[:, : coded.pair_words] = fields[:, ::per_word]
    for i in range(1, per_word):
        part = fields[:, i::per_word]
        body[:, : part.shape[1]] |= np.left_shift(part, i * coded.bits, out=scratch("moved", part.shape))


def _put_scales(coded: Coded, found: Unpacked, head: U64, body: U64) -> None:
    """head [unit, lane, chunk], body [step, unit, lane, chunk]."""
    if coded.scales == "tail":
        body[:, coded.pair_words] = found.d
    elif coded.scales == "head":
        head[:2] = found.d
        if found.minimum is not None:
            head[2:] = found.minimum
    elif found.minimum is None:
        head[0] = found.d[0]
    else:
        _rows_apart(np.stack([found.d[0], found.minimum[0]]), head[:2])
    if found.scales is None:
        return

    # The K-quants' 8 bits a group, a unit a step.
    steps = body[:, coded.pair_words] if coded.scales == "tail_bytes" else head[2:]
    if coded.group == 16:
        scales = found.scales.copy()
        late = scales[:, 4:]  # these lanes begin with the last 16 columns
        scales[:, 4:] = moved(late, 8, LOW_BYTES << 8) | moved(late, -8, LOW_BYTES)
        steps[...] = _row_bytes(scales, 0) | _row_bytes(scales, 1) << 32
        return
    _put_bytes(found, steps)


def _put_bytes(found: Unpacked, steps: U64) -> None:
    """The bytes of scales and minimums, a unit a step. steps [step, lane, chunk]."""
    assert found.scales is not None and found.minimums is not None
    for half in range(2):
        steps[half::2] = _row_bytes(found.scales, half) | _row_bytes(found.minimums, half) << 32


def _put_carried(found: Unpacked, body: U64, n_chunk: int) -> None:
    """The tails, in front of a step's codes: bytes, then factors. body [step, unit, lane, chunk], n_chunk of them a row."""
    assert found.minimum is not None
    _put_bytes(found, body[:, 0])
    factors = scratch("factors", (2, *body.shape[2:]))
    _rows_apart(np.stack([found.d[0], found.minimum[0]]), factors)
    body[::2, 1], body[1:-1:2, 1] = factors
    last = body[-1, 1].reshape(PAIR_LANES, -1, n_chunk)
    following = factors[1].reshape(last.shape)
    last[..., :-1], last[..., -1] = following[..., 1:], following[..., 0]


def _rows_apart(planes: U64, units: U64) -> None:
    """n planes → for each row its 16 bits of all of them, together."""
    n = len(planes)
    source = planes.view(np.uint16).reshape(*planes.shape, PAIR_ROWS)
    target = units.view(np.uint16).reshape(*units.shape, 4)
    for r in range(PAIR_ROWS):
        for i in range(n):
            at = r * n + i
            target[at // 4, ..., at % 4] = source[i, ..., r]


def _row_bytes(planes: U64, odd: int) -> U64:
    """The lower or upper byte of each row's 16 bits, together in 32."""
    apart = moved(planes, -8 * odd, LOW_BYTES)
    apart = moved(apart | moved(apart, -8, LOW_BYTES << 8), 0, 0x0000FFFF0000FFFF)
    return moved(apart | moved(apart, -16, 0xFFFF << 16), 0, 0xFFFFFFFF)
