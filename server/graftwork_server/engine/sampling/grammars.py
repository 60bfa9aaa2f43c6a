"""Structured output: grammars compiled by llguidance, and the masks that they put on logits.

A grammar is compiled off the step loop, once for equal requests; each sequence works on a copy. llguidance counts its
work and gives up at a limit, in compiling and in each step, so a hostile grammar costs a bounded time.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from typing import Any, NoReturn

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

from graftwork_server.engine.sampling.transfer import on_device, sent
from graftwork_server.errors import ErrorBody, FailedPrecondition, InvalidArgument, Violation, from_body
from graftwork_server.text import TextProcessor
from graftwork_server.text.strangers.adapter_text import AdapterTexts
from graftwork_server.types import AdapterRef, ModelInfo
from graftwork_server.wire.engine import Grammar

KEPT = 64
"""Compiled grammars in memory."""
KEPT_TOKENIZERS = 8
"""Tokenizers in memory, the base's among them; those of adapters without files of their own are the base's."""
_Key = tuple[int, tuple[int, ...]]
"""Of a tokenizer: the identity of its TextProcessor, and the tokens that end a text."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 50_000,  # about 15 ms; a schema of 300 properties or 1,000 choices take less than half
    "step_lexer_fuel": 30_000,  # about 8 ms; a token of rare letters in \w takes nearly 20,000, and much less time
    "step_max_items": 10_000,  # about 10 ms
    "max_items_in_row": 1_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Grammars:
    """Compiles grammars for the base's tokenizer and for those of adapters. Blocking; for one thread."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._texts: AdapterTexts | None = None
        self._tokenizers: OrderedDict[_Key, tuple[TextProcessor, LLTokenizer]] = OrderedDict()
        self._compiled: OrderedDict[tuple[_Key, str, str], LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar, adapter: AdapterRef | None) -> LLMatcher:
        """A fresh matcher. Raises InvalidArgument (GRAMMAR_INVALID), FailedPrecondition (TOKENIZER_MISSING, ...)."""
        speaker, tokenizer = self._tokenizer(adapter)
        key = (speaker, grammar.kind, grammar.text)
        if key not in self._compiled:
            limits = LLParserLimits(**_LIMITS)
            matcher = LLMatcher(tokenizer, _source(grammar), limits=limits, log_level=0)
            if matcher.is_error():
                raise _invalid(grammar, matcher.get_error())
            self._try(matcher, grammar)
            self._compiled[key] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key].deep_copy()

    def _try(self, matcher: LLMatcher, grammar: Grammar) -> None:
        """The first mask, which is the dearest, and a token that it allows, on a copy. Copies of `matcher` find what it
        took to compute; a bomb goes off here and in no step. Raises InvalidArgument (GRAMMAR_TOO_COMPLEX)."""
        bits = allocate_token_bitmask(1, self._info.vocab_size)
        fill_next_token_bitmask(matcher, bits)
        trial = matcher.deep_copy()
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        if len(allowed) and not matcher.is_error():
            trial.consume_token(int(allowed[0]))
        for tried in (matcher, trial):
            if tried.is_error():
                raise from_body(too_complex(grammar, tried.get_error()))

    def _tokenizer(self, adapter: AdapterRef | None) -> tuple[_Key, LLTokenizer]:
        if self._texts is None:
            folder = self._info.tokenizer_dir
            base = TextProcessor.from_dir(folder) if folder else None
            self._texts = AdapterTexts(
                base, folder, self._info.vocab_size, compile_template=_no_template, source_dir=self._info.source
            )
        text = self._texts.of(adapter.digest, adapter.path) if adapter else self._texts.base
        if text is None:
            raise FailedPrecondition(
                "the base model brings no tokenizer, so no structured output can be asked for",
                reason="TOKENIZER_MISSING",
            )
        ends = {*self._info.eos_token_ids, *(adapter.end_token_ids if adapter else ())}
        if text.eos_token_id is not None:
            ends.add(text.eos_token_id)
        key = (id(text), tuple(sorted(ends)))
        if key not in self._tokenizers:
            count = self._info.vocab_size
            document = text.to_json() if text.greatest_id < count else _without_tokens_from(count, text.to_json())
            known = [id for id in key[1] if id < count and id <= text.greatest_id]
            made = LLTokenizer(document, n_vocab=count, eos_token=known or None)
            # The processor is kept with it, so that its id belongs to nothing else.
            self._tokenizers[key] = (text, made)
            if len(self._tokenizers) > KEPT_TOKENIZERS:
                old, _ = self._tokenizers.popitem(last=False)
                for compiled in [compiled for compiled in self._compiled if compiled[0] == old]:
                    del self._compiled[compiled]
        self._tokenizers.move_to_end(key)
        return key, self._tokenizers[key][1]


def _without_tokens_from(count: int, tokenizer_json: str) -> str:
    """A tokenizer.json without the tokens from id `count` on: the model, which has no row for them, never says them."""
    document = json.loads(tokenizer_json)
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    model = document["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:count]
    else:
        vocab = model["vocab"] = {token: id for token, id in model["vocab"].items() if id < count}
        if "merges" in model:
            pairs = (tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"])
            model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    return json.dumps(document)


def _no_template(source: str, variables: object) -> NoReturn:
    """Templates are the front's; here they are not even compiled."""
    raise FailedPrecondition("the engine renders no templates", reason="NO_CHAT_TEMPLATE")


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            # As one terminal: a parser with a rule for each of a thousand texts would be over its limit.
            texts: list[str] = json.loads(grammar.text)
            return LLMatcher.grammar_from_regex("|".join(re.escape(text) for text in texts))
        case _:
            return LLMatcher.grammar_from_lark(grammar.text)


def _invalid(grammar: Grammar, detail: str) -> InvalidArgument:
    what = f"cannot be compiled: {' '.join(detail.split())[:400]}"
    field = f"sampling.structured_output.{grammar.kind}"
    return InvalidArgument(f"{field} {what}", reason="GRAMMAR_INVALID", violations=[Violation(field, what)])


def too_complex(grammar: Grammar, detail: str) -> ErrorBody:
    """The error of a sequence whose grammar went over a limit in a step."""
    field = f"sampling.structured_output.{grammar.kind}"
    what = f"took too much work in a step ({' '.join(detail.split())[:200]}); give a simpler one"
    return ErrorBody(
        code="INVALID_ARGUMENT",
        reason="GRAMMAR_TOO_COMPLEX",
        message=f"{field} {what}",
        violations=[Violation(field, what)],
    )


class Masks:
    """Puts the masks of matchers on logits; holds the threads that compute them."""

    def __init__(self, threads: int = 0) -> None:
        self._executor = LLExecutor(threads or None)

    def apply(self, logits: torch.Tensor, rows: SequenceOf[int], matchers: SequenceOf[LLMatcher]) -> None:
        """Sets logits [sequences, vocabulary] of `rows` to -inf, in place, where the matcher allows no token.

        A matcher that fails forbids everything; it then says why.
        """
        vocabulary = logits.shape[-1]
        bits = allocate_token_bitmask(len(rows), vocabulary)
        fill_next_token_bitmask_par(self._executor, [(matcher, i) for i, matcher in enumerate(matchers)], bits)
        for index, matcher in enumerate(matchers):
            if matcher.is_error():
                bits[index] = 0
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=vocabulary)
        forbidden = sent(torch.from_numpy(allowed == 0), logits.device)
        at = on_device(list(rows), torch.int64, logits.device)
        logits[at] = logits[at].masked_fill(forbidden, float("-inf"))
