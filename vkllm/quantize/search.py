"""The search for a group's scale: three ways to find whole numbers that, scaled, come nearest to a group of weights.

Groups lie side by side, x [n, n_group] with one group a column, so that a step of the search is one operation over all of them
and a sum over a group adds its weights in order: in f32, the result is ggml's to the last bit, whose files we want to equal.

Source: ggml's k-quants, https://github.com/ggml-org/llama.cpp/pull/1684 and /pull/4930 (the weighted search).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-15)  # a group whose weights are all below it is a group of zeros


@dataclass(frozen=True, slots=True)
class Affine:
    """x ≈ scale * code - minimum, f32 [n_group] each. `codes()`, f32 [n, n_group], are those of the search."""

    scale: F32
    minimum: F32
    x: F32
    low: F32
    inverse: F32
    top: int

    def codes(self) -> F32:
        codes = np.rint(self.inverse * (self.x - self.low))
        return np.clip(codes, 0, self.top, out=codes)


@dataclass(frozen=True, slots=True)
class Symmetric:
    """x ≈ scale * code with codes from -half to half - 1; a group of zeros has scale 0, inverse 0 and codes -half."""

    scale: F32
    x: F32
    inverse: F32
    half: int

    def codes(self) -> F32:
        codes = np.rint(self.inverse * self.x)
        np.clip(codes, -self.half, self.half - 1, out=codes)
        return np.where(self.inverse == 0, np.float32(-self.half), codes)


def search_affine(x: F32, weight: F32, top: int, first: float, n_step: int, *, absolute: bool) -> Affine:
    """The best of `n_step` + 1 affine fits with codes 0 … top; each least squares for codes rounded with another scale.

    Args: x, weight: [n, n_group]; first: what the first try adds to the number of steps of the range, each next one 0.1 more;
        absolute: judge a fit by its weighted absolute error instead of its square.
    """
    low, high = np.minimum(x.min(axis=0), 0), x.max(axis=0)
    flat = high == low
    sum_w, sum_x = _sum(weight), _sum(weight * x)
    span: F32 = np.where(flat, ONE, high - low)
    inverse = best_inverse = np.float32(top) / span
    scale, minimum, best_low = ONE / inverse, low, low  # of the best fit so far
    code, work = np.empty_like(x), np.empty_like(x)  # of the fit being tried
    _round(x, low, inverse, top, code)
    best = _misfit(x, weight, code, scale, low, work, absolute)
    for step in range(n_step + 1):
        tries = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        inverse = tries / (high - minimum)
        _round(x, minimum, inverse, top, code)
        np.multiply(weight, code, out=work)
        sum_l, sum_xl = _sum(work), _sum(work * x)
        sum_l2 = _sum(np.multiply(work, code, out=work))
        det = sum_w * sum_l2 - sum_l * sum_l
        free = (sum_l2 * sum_x - sum_l * sum_xl) / det
        fit: F32 = np.where(free > 0, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / det)
        offset: F32 = np.where(free > 0, ZERO, free)
        error = _misfit(x, weight, code, fit, offset, work, absolute)
        better = (det > 0) & (error < best)
        best, scale = np.where(better, error, best), np.where(better, fit, scale)
        best_inverse, best_low = np.where(better, inverse, best_inverse), np.where(better, minimum, best_low)
        minimum = np.where(better, offset, minimum)
    return Affine(np.where(flat, ZERO, scale), -minimum, x, best_low, np.where(flat, ZERO, best_inverse), top)


def _round(x: F32, low: F32, inverse: F32, top: int, out: F32) -> None:
    """out = the codes of x, whole numbers from 0 to top."""
    np.subtract(x, low, out=out)
    np.multiply(out, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, 0, top, out=out)


def _misfit(x: F32, weight: F32, code: F32, scale: F32, offset: F32, work: F32, absolute: bool) -> F32:
    """Weighted error of scale * code + offset, [n_group]."""
    np.multiply(scale, code, out=work)
    np.add(work, offset, out=work)
    np.subtract(work, x, out=work)
    np.abs(work, out=work) if absolute else np.multiply(work, work, out=work)
    return _sum(np.multiply(weight, work, out=work))


def search_symmetric(x: F32, half: int) -> Symmetric:
    """The best of 19 scales for codes -half … half - 1, by the error weighted with x²."""
    peak = _peak(x)
    zero = np.abs(peak) < TINY
    peak = np.where(zero, ONE, peak)
    weight = x * x
    weighted, work, code = weight * x, np.empty_like(x), np.empty_like(x)
    best = scale = best_inverse = np.zeros_like(peak)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(half) + np.float32(0.1) * np.float32(step)) / peak
        np.multiply(inverse, x, out=code)
        np.rint(code, out=code)
        np.clip(code, -half, half - 1, out=code)
        sum_xl = _sum(np.multiply(weighted, code, out=work))
        np.multiply(weight, code, out=work)
        sum_l2 = _sum(np.multiply(work, code, out=work))
        if step == 0:
            scale = np.where(sum_l2 != 0, sum_xl / sum_l2, ZERO)
            best, best_inverse = scale * sum_xl, inverse
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = np.where(better, sum_xl / sum_l2, scale)
        best, best_inverse = np.where(better, scale * sum_xl, best), np.where(better, inverse, best_inverse)
    return Symmetric(np.where(zero, ZERO, scale), x, np.where(zero, ZERO, best_inverse), half)


def descend_symmetric(x: F32, half: int) -> tuple[F32, F32]:
    """Codes -half … half - 1 moved one at a time while that lowers the error weighted with x²; five rounds at most.

    Returns: scale [n_group], codes [n, n_group].
    """
    peak = _peak(x)
    zero = np.abs(peak) < TINY
    codes = np.rint(np.float32(-half) / np.where(zero, ONE, peak) * x)
    np.clip(codes, -half, half - 1, out=codes)
    weight = x * x
    weighted = weight * x
    sum_xl, sum_l2 = _sum(weighted * codes), _sum(weight * codes * codes)
    for _ in range(5):
        changed = False
        for xi, wi, wxi, code in zip(x, weight, weighted, codes, strict=True):
            other_xl, other_l2 = sum_xl - wxi * code, sum_l2 - wi * code * code
            new = np.clip(np.rint(xi * other_l2 / other_xl), -half, half - 1)
            new_xl, new_l2 = other_xl + wxi * new, other_l2 + wi * new * new
            gain = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            move = (other_xl > 0) & (new != code) & (new_l2 > 0) & gain
            if move.any():
                changed = True
                np.copyto(code, new, where=move)
                np.copyto(sum_xl, new_xl, where=move)
                np.copyto(sum_l2, new_l2, where=move)
        if not changed:
            break
    scale = np.where((sum_l2 > 0) & ~zero, sum_xl / sum_l2, ZERO)
    return scale, np.where(zero, np.float32(-half), codes)


def _peak(x: F32) -> F32:
    """Of each group the weight farthest from zero, the first of equals."""
    return np.asarray(np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0])


def _sum(x: F32) -> F32:
    """Sum over a group, in order."""
    return np.asarray(np.add.reduce(x, axis=0))
