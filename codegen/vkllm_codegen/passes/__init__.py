"""Optimization passes over the IR."""

from __future__ import annotations

from ..ir import Program


def optimize(program: Program) -> Program:
    """All passes."""
    return program
