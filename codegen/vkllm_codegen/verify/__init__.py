"""The verifier: a program that passes has a meaning on every device.

Three questions: does every operation have the operand types it needs (`rules`), is every value visible where it is used
(`scopes`), and is every barrier reached by all invocations of its workgroup (`uniformity`)?
"""

from .check import verify
from .rules import RULES

__all__ = ["RULES", "verify"]
