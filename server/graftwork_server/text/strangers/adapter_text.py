"""Tokenizers and chat templates that adapters bring: read from an artifact's files, checked against the base's.

An artifact may hold tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat templates; what it does not
hold is the base's.
It came from somewhere. The rules that cut and join text (a regular expression can take for ever, a post-processor fill
the memory) and the model's parameters must be the base's; that is seen in the JSON before the library gets it. What is
left - a vocabulary, merges, added tokens - still is a stranger's: helper_main.py works with it in a process of its own.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from graftwork_server.errors import FailedPrecondition
from graftwork_server.text import CompileTemplate, TextProcessor, TokenizerFiles
from graftwork_server.text.chat_template import ChatTemplate, Template

CACHED_TEXTS = 32
"""Tokenizers of adapters in memory."""
MAX_TOKEN_CHARACTERS = 512
"""Length that a token may have; beyond it, the length of the base's longest."""
MAX_FILE_BYTES = 4 << 20
"""Size up to which a file is read; beyond it, twice the size of the base's own."""


class AdapterTexts:
    """TextProcessors of adapters by digest, the last used ones kept. Blocking; safe to use from several threads."""

    def __init__(
        self,
        base: TextProcessor | None,
        base_dir: str | None,
        vocab_size: int,
        compile_template: CompileTemplate = ChatTemplate,
        source_dir: str | None = None,
    ) -> None:
        """`vocab_size`: rows of the base model's embeddings; a tokenizer may use no id beyond them.
        `compile_template`: for templates of adapters.
        `source_dir`: the checkpoint that `base_dir` was resolved from; an adapter's files may be as in either."""
        self.base = base
        self._base_files = TokenizerFiles.of(Path(base_dir)) if base_dir else TokenizerFiles(None, None, None)
        self._source_files = TokenizerFiles.of(Path(source_dir)) if source_dir else self._base_files
        self._vocab_size = vocab_size
        self._compile_untrusted = compile_template
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, TextProcessor | None] = OrderedDict()

    def of(self, digest: str, folder: str | Path) -> TextProcessor | None:
        """The adapter's own, or the base's where it brings none (None if the base has none either).

        Raises FailedPrecondition: TOKENIZER_INVALID, TOKENIZER_MISMATCH, CHAT_TEMPLATE_BROKEN.
        """
        with self._lock:
            if digest not in self._cache:
                self._cache[digest] = self.read(folder)
                if len(self._cache) > CACHED_TEXTS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(digest)
            return self._cache[digest]

    def read(self, folder: str | Path) -> TextProcessor | None:
        """As `of`, for files that have no digest yet."""
        brought = TokenizerFiles.of(Path(folder))
        own = self._changed(brought)
        if not _brings(own):
            return self.base
        for file, source in zip(_plain(own), _plain(self._source_files), strict=True):
            _check_size(file, source)
        for file in own.named_templates.values():
            _check_size(file, None)
        # What stands beside a changed file counts together with it, be it a copy of the base's or not.
        templates = own if own.config is None and own.template is None and not own.named_templates else brought
        files = TokenizerFiles(
            own.tokenizer or self._base_files.tokenizer,
            own.config or self._base_files.config,
            templates.template or (None if own.config else self._base_files.template),
            brought.special_tokens_map if own.config else own.special_tokens_map,
            named_templates=templates.named_templates,
        )
        text = TextProcessor.from_files(
            files,
            self._compile,
            self.base.chat_templates if self.base else None,
            tokenizer=self._tokenizer(own.tokenizer),
            facts=self.base.facts if self.base else None,
        )
        if text.greatest_id >= self._vocab_size:
            raise _mismatch(
                f"the tokenizer has token id {text.greatest_id}; the base model's vocabulary ends at "
                f"{self._vocab_size - 1}"
            )
        return text

    @property
    def base_bytes(self) -> int:
        """Size of the base's tokenizer.json, 0 without one."""
        return self._base_files.tokenizer.stat().st_size if self._base_files.tokenizer else 0

    def brings_nothing(self, folder: str | Path) -> bool:
        """Whether the files of `folder`, if there are any, are byte for byte the base's. What they say is not read."""
        return not _brings(self._changed(TokenizerFiles.of(Path(folder))))

    def _changed(self, files: TokenizerFiles) -> TokenizerFiles:
        """Those of `files` that are no copies of the base's."""
        copies = (_plain(self._source_files), _plain(self._base_files))
        tokenizer, config, template, special_tokens_map = (
            None if own is None or any(base is not None and _same(own, base) for base in bases) else own
            for own, *bases in zip(_plain(files), *copies, strict=True)
        )
        base_named = self._source_files.named_templates
        named = {
            name: own
            for name, own in files.named_templates.items()
            if name not in base_named or not _same(own, base_named[name])
        }
        return TokenizerFiles(tokenizer, config, template, special_tokens_map, named_templates=named)

    def _compile(self, source: str, variables: Mapping[str, str]) -> Template:
        trusted = self.base is not None and source in self.base.chat_templates.values()
        return ChatTemplate(source, variables) if trusted else self._compile_untrusted(source, variables)

    def _tokenizer(self, file: Path | None) -> Tokenizer | None:
        """The tokenizer in `file`: its tokens and merges, with the base's rules, which are all that it may have.

        None without a file. What differs is found in the JSON: the library would run it, or panic, as it reads it.
        """
        if self._base_files.tokenizer is None:
            raise _mismatch("the base model brings no tokenizer, so none of an adapter can be compared with it")
        if file is None:
            return None
        own, base = _document(file), _document(self._base_files.tokenizer)
        differing = _differing(own, base)
        if differing and self._source_files.tokenizer is not None:
            # What transformers makes of the checkpoint's file may be another thing than the file says.
            differing = _differing(own, _document(self._source_files.tokenizer)) and differing
        if differing:
            raise _mismatch(
                f"{', '.join(differing)} must be as in the base model's tokenizer; tokens, merges and special tokens "
                "may differ"
            )
        model = base["model"] | {part: own["model"][part] for part in _PARTS if part in own["model"]}
        _check_tokens(model["vocab"], own.get("added_tokens") or [], base)
        rules = {rule: base.get(rule) for rule in _RULES}
        document = {"version": "1.0", "added_tokens": own.get("added_tokens") or [], **rules, "model": model}
        try:
            return Tokenizer.from_str(json.dumps(document))
        except MemoryError:
            raise  # whoever bounds it says so, and knows whose file went over the limit
        except Exception as error:  # tokenizers raises plain Exception
            raise _invalid(str(error)[:200]) from error


_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of a tokenizer.json that cut and join text."""
_PARTS = ("vocab", "merges")
"""Parts of its model that an adapter may have of its own."""
_DEFAULTS: dict[str, Any] = {"max_input_chars_per_word": 100}
"""Parameters of models whose default is something else than nothing."""


def _differing(own: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Rules and parameters of the model that differ."""
    rules = [rule for rule in _RULES if not _same_rule(rule, own.get(rule), base.get(rule))]
    parameters = _parameters(own["model"]), _parameters(base["model"])
    names = sorted(parameters[0].keys() | parameters[1].keys())
    return rules + [f"model.{name}" for name in names if not _equal(*(known.get(name) for known in parameters))]


def _document(file: Path) -> dict[str, Any]:
    """A tokenizer.json of the form that is expected."""
    try:
        document = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _invalid("the file is no JSON") from error
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise _invalid("it has no model with a vocabulary")
    if not isinstance(document.get("added_tokens") or [], list):
        raise _invalid("its added_tokens are no list")
    return dict(document)


def _equal(one: Any, other: Any) -> bool:
    """As JSON: true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _same_rule(rule: str, own: Any, base: Any) -> bool:
    """Whether two values of a rule say the same; one may leave out what an older version of the library had not."""
    return _equal(own, base) or _equal(_written(rule, own), _written(rule, base))


def _written(rule: str, value: Any) -> Any:
    """`value` as this version of the library writes it, alone in a tokenizer that has no tokens."""
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return json.loads(Tokenizer.from_str(json.dumps(empty | {rule: value})).to_str()).get(rule)
    except MemoryError:
        raise  # see _tokenizer
    except Exception as error:  # tokenizers raises plain Exception
        raise _invalid(f"{rule} cannot be read") from error


def _parameters(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model has beside its parts. What is left out, null, false and "" all mean: not used."""
    named = {name: value for name, value in model.items() if name not in _PARTS and value != _DEFAULTS.get(name)}
    named["type"] = model.get("type") or _type(model)
    return {name: value for name, value in named.items() if value is not None and value is not False and value != ""}


def _type(model: Mapping[str, Any]) -> str:
    """The type of a model in a file that is so old that it does not name it."""
    if isinstance(model["vocab"], list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _check_tokens(vocab: Any, added: Sequence[Any], base: Mapping[str, Any]) -> None:
    """Tokens have a bounded length: what they cost when they are looked for, joined and sent grows with it."""
    longest = max(map(len, _token_texts(base["model"]["vocab"], base.get("added_tokens") or [])), default=0)
    most = max(MAX_TOKEN_CHARACTERS, longest)
    for token in _token_texts(vocab, added):
        if len(token) > most:
            raise _mismatch(f"a token has {len(token)} characters; at most {most} are accepted with this base model")


def _token_texts(vocab: Any, added: Sequence[Any]) -> Iterator[str]:
    """The tokens of a vocabulary, {token: id} or [[token, score], ...], and those added. Raises TOKENIZER_INVALID."""
    try:
        for token in vocab if isinstance(vocab, dict) else (entry[0] for entry in vocab):
            yield token + ""
        for entry in added:
            yield entry["content"] + ""
    except (TypeError, LookupError) as error:
        raise _invalid("a token is no text") from error


def _invalid(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"tokenizer.json: {what}", reason="TOKENIZER_INVALID", field="tokenizer.json")


def _mismatch(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"tokenizer.json: {what}", reason="TOKENIZER_MISMATCH", field="tokenizer.json")


def _plain(files: TokenizerFiles) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    """The files that an adapter may bring, beside named templates."""
    return files.tokenizer, files.config, files.template, files.special_tokens_map


def _brings(changed: TokenizerFiles) -> bool:
    return any(_plain(changed)) or bool(changed.named_templates)


def _same(own: Path, base: Path) -> bool:
    return own.stat().st_size == base.stat().st_size and own.read_bytes() == base.read_bytes()


def _check_size(own: Path | None, base: Path | None) -> None:
    if own is None:
        return
    most = max(MAX_FILE_BYTES, 2 * base.stat().st_size if base else 0)
    if own.stat().st_size > most:
        raise FailedPrecondition(
            f"{own.name}: it has {own.stat().st_size} bytes; at most {most} are accepted with this base model",
            reason="TOKENIZER_MISMATCH",
            field=own.name,
        )
