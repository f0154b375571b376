"""Errors of the compiler: every one says what was found, and hints at what to do next."""

from __future__ import annotations


class HintedError(Exception):
    """An error with a next step. `str()` gives the message and, on a second line, the hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class KernelError(HintedError):
    """A kernel cannot be built."""


class TraceError(KernelError):
    """The Python body of a kernel did something the kernel language does not allow."""


class VerifyError(KernelError):
    """The IR breaks one of its own rules."""
