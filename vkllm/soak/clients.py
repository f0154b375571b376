"""Clients of a soak: threads that keep the engine busy."""

from __future__ import annotations

import logging
import random
import threading

from vkllm.batching import BatchEngine
from vkllm.errors import CapacityError, VkllmError
from vkllm.sampler import SamplingParams
from vkllm.soak.options import SoakOptions

log = logging.getLogger("vkllm.soak")
TEXT = (
    "The keeper of the lighthouse wrote down the weather every evening: wind, sea, and how far one could see. Some days he saw"
    " the islands in the west, some days not even the rocks below. Ships passed by whose names he did not know. In the morning he"
    " cleaned the lamp, filled it with oil, and counted the steps down to the shore, where the boat brought bread and letters. "
)


class Clients:
    """One stream each, prompts of many lengths, a new one when one ends."""

    def __init__(self, batch: BatchEngine, options: SoakOptions) -> None:
        self._batch, self._options, self._stop, self._lock = batch, options, threading.Event(), threading.Lock()
        self.requests = self.refused = self.errors = 0
        n_prompt = max(1, min(256, batch.n_ctx // 2))
        piece = batch.tokenizer.encode(TEXT, add_special=False)
        self._ids, self._n_prompt = piece * (2 + n_prompt // len(piece)), n_prompt
        self._n_piece = len(piece)
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(options.streams)]
        for thread in self._threads:
            thread.start()

    def _work(self, index: int) -> None:
        rng = random.Random(self._options.seed * 1000 + index)
        while not self._stop.is_set() and self._batch.failure is None:
            start, n = rng.randrange(self._n_piece), rng.randint(min(8, self._n_prompt), self._n_prompt)
            n_new = rng.randint(max(1, self._options.max_tokens // 4), self._options.max_tokens)
            params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
            try:
                self._batch.submit(self._ids[start : start + n], params).result()
            except CapacityError as error:
                self._count(refused=1)
                self._stop.wait(min(error.retry_after_s, 1.0))
            except VkllmError as error:
                if not self._stop.is_set():
                    log.warning("a request failed: %s", error)
                    self._count(errors=1)
            else:
                self._count(requests=1)

    def _count(self, requests: int = 0, refused: int = 0, errors: int = 0) -> None:
        with self._lock:
            self.requests, self.refused, self.errors = self.requests + requests, self.refused + refused, self.errors + errors

    def stop(self) -> None:
        """No new requests."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the threads; the engine must have been closed."""
        for thread in self._threads:
            thread.join()
