"""JSON that must parse: llguidance says which tokens may come next, the batch engine masks the others.

Nothing here touches the device; masks are made in the batch engine's worker thread, between steps.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from vkllm.errors import RequestError
from vkllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


FORM: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's json writes it, on one line: models know it, and they cannot go on with white space for ever."""


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.special_token_ids = [i for i in range(tokenizer.n_vocab) if tokenizer.is_control(i)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special=False)


class GrammarConstraint:
    """One request's place in its grammar: a `Constraint` of the batch engine."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher, self._n_vocab = matcher, n_vocab

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [n_vocab]. Raises: RequestError: the grammar is too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").astype(np.bool_)

    def accept(self, token_id: int) -> bool:
        """A token was chosen. Returns whether more may follow."""
        self._matcher.consume_token(token_id)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"response_format: {self._matcher.get_error().splitlines()[0]}", hint="use a simpler schema")


class Grammars:
    """Makes constraints for one tokenizer, whose vocabulary is prepared at the first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def json(self, schema: Mapping[str, Any]) -> GrammarConstraint:
        """JSON that follows `schema`, on one line.

        Raises: RequestError: the schema is invalid, too complex, or uses what llguidance does not know.
        """
        if not self._tokenizer.eos_ids:
            raise RequestError("the model has no end token", hint="leave response_format out")
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM)
        except ValueError as error:
            raise RequestError(f"response_format: {error}", hint="give a JSON schema") from error
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        constraint = GrammarConstraint(matcher, self._tokenizer.n_vocab)
        constraint._check()
        return constraint

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:
                wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer))
                ends = sorted(self._tokenizer.eos_ids)
                self._prepared = LLTokenizer(wrapper, n_vocab=self._tokenizer.n_vocab, eos_token=ends)
            return self._prepared
