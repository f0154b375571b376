"""Chat templates in a process of their own, with a deadline: a template that never ends is killed, and the server goes on.

The child (`python -m vkllm.serve.render`) reads one JSON object a line and answers with one; it may not use much memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vkllm.chat import render
from vkllm.errors import RequestError, VkllmError

MEMORY_BYTES = 4 << 30
MAX_CHARS = 32 << 20


class TemplateWorker:
    """Renders one template. Thread-safe; one conversation at a time."""

    def __init__(self, template: str, bos_token: str, eos_token: str, deadline_s: float = 2.0) -> None:
        self._fixed = {"template": template, "bos_token": bos_token, "eos_token": eos_token}
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def knows_tools(self) -> bool:
        """Does the template say what tools there are?"""
        return "tools" in self._fixed["template"]

    def start(self) -> None:
        """Make the child ready, so that the first conversation does not wait for it."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._kill()

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt of a conversation.

        Raises: RequestError: as `vkllm.chat.render`, or the template took too long or too much memory.
        """
        line = json.dumps(self._fixed | {"messages": list(messages), "tools": tools}).encode() + b"\n"
        with self._lock:
            child = self._started()
            timer = threading.Timer(self._deadline_s, child.kill)
            timer.start()
            try:
                answer = self._ask(child, line)
            finally:
                timer.cancel()
            if not answer:
                self._kill()
                raise RequestError(
                    f"chat template: gave no prompt within {self._deadline_s:g} s",
                    hint="shorten the messages, or use /v1/completions",
                )
        reply = json.loads(answer)
        if "error" in reply:
            raise RequestError(reply["error"], hint=reply["hint"])
        text: str = reply["text"]
        return text

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._kill()
            command = [sys.executable, "-m", "vkllm.serve.render"]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._child.stdout is not None
            self._child.stdout.readline()  # it is ready
        return self._child

    @staticmethod
    def _ask(child: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line)
            child.stdin.flush()
            return child.stdout.readline()
        except OSError:  # killed meanwhile
            return b""

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = render(
            request["template"],
            request["messages"],
            bos_token=request["bos_token"],
            eos_token=request["eos_token"],
            tools=request["tools"],
        )
    except VkllmError as error:
        return {"error": error.message, "hint": error.hint}
    if len(text) > MAX_CHARS:
        return {"error": f"chat template: the prompt has {len(text)} characters", "hint": "shorten the messages"}
    return {"text": text}


def main() -> None:
    """The child: answers until its input ends. Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limits here: the deadline remains
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
