"""Tokenizers and chat templates that adapters bring: read from an artifact's files, checked against the base's.

An artifact may hold tokenizer.json, tokenizer_config.json and chat_template.jinja; what it does not hold is the base's.
It came from somewhere, so nothing in it may cost more than the base's own: the rules that cut and join text must be the
base's (a regular expression can take for ever), and a template runs in a process of its own.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from graftwork_server.chat_template import ChatTemplate, Template
from graftwork_server.errors import FailedPrecondition
from graftwork_server.template_process import TemplateProcess
from graftwork_server.text import CompileTemplate, TextProcessor, TokenizerFiles

KEPT = 32
"""Tokenizers of adapters in memory."""
MAX_FILE_BYTES = 4 << 20
"""Size up to which a file is read; beyond it, twice the size of the base's own."""


class AdapterTexts:
    """TextProcessors of adapters by digest, the last used ones kept. Blocking; safe to use from several threads."""

    def __init__(
        self,
        base: TextProcessor | None,
        base_dir: str | None,
        vocab_size: int,
        compile_template: CompileTemplate | None = None,
        source_dir: str | None = None,
    ) -> None:
        """`vocab_size`: rows of the base model's embeddings; a tokenizer may use no id beyond them.
        `compile_template`: for templates of adapters; by default they get a process of their own.
        `source_dir`: the checkpoint that `base_dir` was resolved from; an adapter's files may be copies of either."""
        self.base = base
        self._base_files = TokenizerFiles.of(Path(base_dir)) if base_dir else TokenizerFiles(None, None, None)
        self._source_files = TokenizerFiles.of(Path(source_dir)) if source_dir else self._base_files
        self._vocab_size = vocab_size
        self._templates = TemplateProcess()
        self._compile_strange = compile_template or self._templates.compile
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, TextProcessor | None] = OrderedDict()

    def known(self, digest: str) -> bool:
        """Whether `of` would answer without reading files."""
        return digest in self._kept

    def of(self, digest: str, folder: str | Path) -> TextProcessor | None:
        """The adapter's own, or the base's where it brings none (None if the base has none either).

        Raises FailedPrecondition: TOKENIZER_INVALID, TOKENIZER_MISMATCH, CHAT_TEMPLATE_BROKEN.
        """
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = self.read(folder)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def read(self, folder: str | Path) -> TextProcessor | None:
        """As `of`, for files that have no digest yet."""
        own = self._without_copies(TokenizerFiles.of(Path(folder)))
        if not any(_plain(own)):
            return self.base
        for mine, source in zip(_plain(own), _plain(self._source_files), strict=True):
            _check_size(mine, source)
        files = TokenizerFiles(
            own.tokenizer or self._base_files.tokenizer,
            own.config or self._base_files.config,
            own.template or (None if own.config else self._base_files.template),
            own.special_tokens_map,
        )
        self._check_rules(own.tokenizer)
        text = TextProcessor.from_files(
            files,
            self._compile,
            self.base.chat_templates if self.base else None,
            base=self.base,
        )
        if text.greatest_id >= self._vocab_size:
            raise _mismatch(
                f"the tokenizer has token id {text.greatest_id}; the base model's vocabulary ends at "
                f"{self._vocab_size - 1}"
            )
        return text

    def _without_copies(self, own: TokenizerFiles) -> TokenizerFiles:
        """The files of `own` that say something else than the base's."""
        bases = (_plain(self._source_files), _plain(self._base_files))
        tokenizer, config, template, special_tokens_map = (
            mine if mine is not None and not any(base is not None and _same(mine, base) for base in same_name) else None
            for mine, *same_name in zip(_plain(own), *bases, strict=True)
        )
        return TokenizerFiles(tokenizer, config, template, special_tokens_map)

    def close(self) -> None:
        """Ends the process that renders templates."""
        self._templates.close()

    def _compile(self, source: str, variables: Mapping[str, str]) -> Template:
        trusted = self.base is not None and source in self.base.chat_templates.values()
        return ChatTemplate(source, variables) if trusted else self._compile_strange(source, variables)

    def _check_rules(self, tokenizer: Path | None) -> None:
        """Before the tokenizer is made: already that would run its rules on its tokens."""
        if self._base_files.tokenizer is None:
            raise _mismatch("the base model brings no tokenizer, so none of an adapter can be compared with it")
        if tokenizer is None:
            return
        mine, base = _rules(tokenizer), _rules(self._base_files.tokenizer)
        # What the checkpoint's file says may not be what transformers makes of it: a copy may have either.
        source = _rules(self._source_files.tokenizer) if self._source_files.tokenizer else base
        differing = [rule for rule in mine if mine[rule] not in (base[rule], source[rule])]
        if differing:
            raise _mismatch(
                f"{', '.join(differing)} must be as in the base model's tokenizer; tokens, merges and special tokens "
                "may differ"
            )


def _rules(tokenizer: Path) -> dict[str, Any]:
    """How a tokenizer.json cuts and joins text, written as this version of the library writes it."""
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        document = json.loads(tokenizer.read_text("utf-8"))
        rules = {rule: document.get(rule) for rule in ("normalizer", "pre_tokenizer", "decoder")}
        written = json.loads(Tokenizer.from_str(json.dumps(empty | rules)).to_str())
        return {rule: written.get(rule) for rule in rules} | {"model.type": document["model"].get("type")}
    except Exception as error:  # tokenizers raises plain Exception
        raise FailedPrecondition(
            "tokenizer.json: the file cannot be read", reason="TOKENIZER_INVALID", field="tokenizer.json"
        ) from error


def _mismatch(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"tokenizer.json: {what}", reason="TOKENIZER_MISMATCH", field="tokenizer.json")


def _plain(files: TokenizerFiles) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    """The files that an adapter may bring."""
    return files.tokenizer, files.config, files.template, files.special_tokens_map


def _same(mine: Path, base: Path) -> bool:
    return mine.stat().st_size == base.stat().st_size and mine.read_bytes() == base.read_bytes()


def _check_size(mine: Path | None, base: Path | None) -> None:
    if mine is None:
        return
    most = max(MAX_FILE_BYTES, 2 * base.stat().st_size if base else 0)
    if mine.stat().st_size > most:
        raise FailedPrecondition(
            f"{mine.name}: it has {mine.stat().st_size} bytes; at most {most} are accepted with this base model",
            reason="TOKENIZER_MISMATCH",
            field=mine.name,
        )
