"""Optimization passes over the IR. Each takes and returns a program; the verifier runs after each.

Order: fold, so that loop bounds are constants where they can be; unroll; fold the copies; hoist what does not change in a loop;
merge equal computations; drop what nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir import Program
from ..verify import verify
from .cse import merge_equal
from .dce import drop_dead
from .fold import fold
from .hoist import hoist
from .unroll import unroll

Pass = Callable[[Program], Program]
PASSES: tuple[Pass, ...] = (fold, unroll, fold, hoist, merge_equal, drop_dead)


def optimize(program: Program, passes: tuple[Pass, ...] = PASSES) -> Program:
    """Verify, then run the passes, verifying after each.

    Raises: VerifyError: the program breaks a rule (before any pass: the user's mistake; after one: ours).
    """
    verify(program)
    results: dict[Pass, Program] = {}
    for step in passes:
        if results.get(step) is program:
            continue  # nothing has changed since this pass ran
        changed = step(program)
        if changed is not program:
            verify(changed, after=step.__name__)
        program = results[step] = changed
    return program


__all__ = ["PASSES", "drop_dead", "fold", "hoist", "merge_equal", "optimize", "unroll"]
