"""The base model's tokenizer as transformers resolves it, written down for the processes that have no transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer

from graftwork_server.errors import FailedPrecondition, GraftworkServerError
from graftwork_server.text import ModelFacts, TextProcessor, write_base_tokenizer

_DEFAULT = "default"
log = logging.getLogger("graftwork.engine")


def resolved_tokenizer(source: str, cache_dir: Path, name: str, facts: ModelFacts) -> str | None:
    """A directory with the model's tokenizer, for TextProcessor; None if the model has none.

    Which class a checkpoint's files belong to, what that class makes of them, which tokens it names where the files do
    not: AutoTokenizer decides, so what is served and trained is what it gives.
    """
    target = cache_dir / "tokenizers" / name.removeprefix("sha256:")[:32]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        # No tokenizer files at all: the model still answers token ids, and the front says so for text.
        return _as_it_is(source, target, facts, error) if (Path(source) / "tokenizer.json").is_file() else None
    if not tokenizer.is_fast or len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        return None  # transformers made one up from the configuration: nothing but special tokens
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {_DEFAULT: templates}
    return _written(target, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, templates, facts)


def _as_it_is(source: str, target: Path, facts: ModelFacts, error: Exception) -> str:
    """What tokenizer.json says by itself, where transformers would need code that comes with the checkpoint."""
    log.warning("transformers does not read this model's tokenizer, tokenizer.json is taken as it is: %s", error)
    try:
        text = TextProcessor.from_dir(source)
    except GraftworkServerError:
        return source  # whoever needs it says what is wrong with it
    return _written(target, text.to_json(), text.named_tokens, text.chat_templates, facts)


def _written(
    target: Path, tokenizer: str, named: Mapping[str, str], templates: Mapping[str, str], facts: ModelFacts
) -> str:
    try:
        write_base_tokenizer(target, tokenizer, named, templates, facts)
    except OSError as error:
        why = error.strerror or "input/output error"
        raise FailedPrecondition(
            f"the base model's tokenizer cannot be written to cache/tokenizers: {why}; "
            "give --data-dir a directory with room that this user can write to",
            reason="DATA_DIR_UNUSABLE",
        ) from error
    return str(target)
