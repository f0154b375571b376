"""Runs a command in this process: `vkllm("run", "tiny", ...)`."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from vkllm.cli import app


@dataclass(frozen=True)
class Outcome:
    """What a shell would see of a command."""

    code: int
    stdout: str
    stderr: str


def vkllm(*args: str, stdin: str | bytes | None = None) -> Outcome:
    """Run one command. What is no error of ours is raised, not hidden in the outcome."""
    result = CliRunner().invoke(app, list(args), input=stdin, prog_name="vkllm", env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
