"""Text to tokens and back, as the front and the tuner's data do it; the only tokenizer code of the server.

Works on the files of a Hugging Face tokenizer (tokenizer.json, tokenizer_config.json, chat_template.jinja) with the
`tokenizers` library alone: importing transformers would take seconds and bring torch into the front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from graftwork_server.chat_template import ChatTemplate, Message, Span, Template
from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
_TOKEN_TEXTS = 65_536
"""Tokens whose text is remembered."""


CompileTemplate = Callable[[str, Mapping[str, str]], Template]
"""From a chat template's source and variables to what renders it; ChatTemplate's signature."""


class TokenizerFiles(msgspec.Struct, frozen=True):
    """Where the three files are that say how text and tokens belong together; None for what there is not."""

    tokenizer: Path | None
    config: Path | None
    template: Path | None

    @classmethod
    def of(cls, folder: Path) -> TokenizerFiles:
        """The files that `folder` has."""
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        return cls(*(folder / name if (folder / name).is_file() else None for name in names))


class TextProcessor:
    """The base model's tokenizer and chat template. Safe to use from several threads.

    `tokenizer` is changed: truncation and padding are switched off and the special tokens that `config`
    (tokenizer_config.json) names are added, as transformers does when it loads the same files.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | None,
        compile_template: CompileTemplate = ChatTemplate,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_template_source = chat_template
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.named_tokens = {name: text for name in _NAMED_TOKENS if (text := _token_content(config.get(name)))}
        """bos_token, eos_token, ... as far as the model has them."""
        _add_missing_tokens(tokenizer, config, self.named_tokens)
        _set_post_processor(tokenizer, config, self.named_tokens)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        """Ids that decode() leaves out."""
        self._special_texts = tuple(token.content for token in added.values() if token.special)
        self.byte_fallback_ids = _byte_fallback_ids(tokenizer)
        """Ids of the tokens that stand for one byte of a character outside the vocabulary."""
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._token_text = lru_cache(_TOKEN_TEXTS)(self._make_token_text)
        self._template: Template | GraftworkServerError | None = None
        if chat_template is not None:
            try:
                self._template = compile_template(chat_template, self.named_tokens)
            except GraftworkServerError as error:
                self._template = error  # Everything but chat works without it.

    @classmethod
    def from_dir(cls, path: str | Path) -> TextProcessor:
        """Reads the tokenizer's files in `path`. Raises FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID)."""
        return cls.from_files(TokenizerFiles.of(Path(path)))

    @classmethod
    def from_files(
        cls,
        files: TokenizerFiles,
        compile_template: CompileTemplate = ChatTemplate,
        default_template: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> TextProcessor:
        """Reads the files; `default_template` is for those that bring none, `tokenizer` what was made of its file.

        Raises FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID).
        """
        if files.tokenizer is None:
            raise FailedPrecondition(
                "the model brings no tokenizer.json; only token ids can be used with it", reason="TOKENIZER_MISSING"
            )
        try:
            tokenizer = tokenizer or Tokenizer.from_file(str(files.tokenizer))
            config = json.loads(files.config.read_text("utf-8")) if files.config else {}
            template = files.template.read_text("utf-8") if files.template else config.get("chat_template")
            return cls(tokenizer, config, _default_template(template) or default_template, compile_template)
        except GraftworkServerError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for damaged files
            raise FailedPrecondition(
                f"the tokenizer files cannot be read: {_without_paths(error)}", reason="TOKENIZER_INVALID"
            ) from error

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json would have it, with every token that the configuration adds."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer's post-processor adds."""
        return self._encode(text, add_special_tokens=True).ids

    def encode_pair(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts joined as the tokenizer's post-processor joins them, and the type of each token."""
        encoding = self._encode(text, add_special_tokens=True, pair=pair)
        return encoding.ids, encoding.type_ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` alone. Special tokens written out in the text are recognised."""
        return self._encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, id: int) -> str:
        """One token as text, special tokens included, a leading space kept. Ids outside the vocabulary are ""."""
        return self._token_text(id)

    def _make_token_text(self, id: int) -> str:
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return ""
        text: str = self._tokenizer.decode([id], skip_special_tokens=False)
        # SentencePiece decoders drop the space of what they take for the beginning of a text.
        if token.startswith("\u2581") and not text.startswith(" "):
            return " " + text
        return text

    def token_id(self, token: str) -> int | None:
        """Id of a token of the vocabulary, such as "</s>"."""
        return self._tokenizer.token_to_id(token)

    @property
    def greatest_id(self) -> int:
        """Greatest id of any token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-sequence token, if it names one."""
        eos = self.named_tokens.get("eos_token")
        return None if eos is None else self.token_id(eos)

    @property
    def has_chat_template(self) -> bool:
        """Whether render_chat and encode_chat can work."""
        return self._template is not None and not isinstance(self._template, GraftworkServerError)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as the model reads it; with `add_generation_prompt`, up to where its answer begins.

        Raises InvalidArgument (CHAT_TEMPLATE_REJECTED) if the template does not take these messages, and
        FailedPrecondition (NO_CHAT_TEMPLATE, CHAT_TEMPLATE_BROKEN) if there is none to use.
        """
        template = self._chat_template()
        return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of render_chat; its text already has every special token, so none is added.

        With `continue_final_message` the text ends where the last message's content does, and nothing follows.
        """
        if continue_final_message:
            return self.encode_plain(self._chat_template().render_unfinished(messages, tools=tools))
        return self.encode_plain(self.render_chat(messages, add_generation_prompt, tools=tools))

    def encode_chat_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and 1 for each that the assistant writes: its content and what ends its turn.

        The template's generation blocks say so where it has them. Elsewhere a turn is what follows the generation
        prompt of the messages before it; a template in which a turn's text changes with what comes later gives no
        such answer and is refused: InvalidArgument (CHAT_TEMPLATE_NOT_PREFIX_STABLE).
        """
        template = self._chat_template()
        if template.marks_generation:
            text, spans = template.render_with_spans(messages)
        else:
            text, spans = self._spans_by_prefix(template, messages)
        spans = [self._with_end_of_turn(text, span) for span in spans]
        encoding = self._encode(text, add_special_tokens=False)
        return encoding.ids, _mask(encoding.offsets, spans)

    def _encode(self, text: str, add_special_tokens: bool, pair: str | None = None) -> Encoding:
        try:
            return self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError) as error:  # lone surrogates, as JSON's "\ud800" gives them
            raise InvalidArgument("the text is not valid Unicode", reason="TEXT_INVALID", field="text") from error

    def _chat_template(self) -> Template:
        if isinstance(self._template, GraftworkServerError):
            raise self._template
        if self._template is None:
            raise FailedPrecondition(
                "the base model has no chat template; use Generate with a prompt, or rows of prompt and completion",
                reason="NO_CHAT_TEMPLATE",
            )
        return self._template

    def _spans_by_prefix(self, template: Template, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        text = template.render(messages, add_generation_prompt=False)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = template.render(messages[:index], add_generation_prompt=True)
            through = template.render(messages[: index + 1], add_generation_prompt=False)
            if not (through.startswith(before) and text.startswith(through)):
                raise InvalidArgument(
                    f"the chat template does not show where assistant message {index + 1} begins and ends: it "
                    "renders the conversation up to there differently when more follows. Use a template with "
                    "{% generation %} blocks, or rows that have one assistant message, at the end",
                    reason="CHAT_TEMPLATE_NOT_PREFIX_STABLE",
                    field="messages",
                )
            spans.append((len(before), self._cut_after_special(text, len(before), len(through))))
        return text, spans

    def _cut_after_special(self, text: str, start: int, end: int) -> int:
        """`end` without the white space after the token that ends the turn: a model stops before it."""
        turn = text[start:end].rstrip()
        return start + len(turn) if turn.endswith(self._special_texts) else end

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """A model that is never shown its end of sequence does not stop, so a block that leaves it out is widened."""
        start, end = span
        eos = self.named_tokens.get("eos_token", "")
        if eos and not text[start:end].rstrip().endswith(eos) and text.startswith(eos, end):
            return start, end + len(eos)
        return span


class TextPiece(msgspec.Struct, frozen=True):
    """Text that became certain, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come.

    A piece never holds half a character, nor U+FFFD where later tokens complete it, nor any part of a stop text.
    Without a stop, the pieces together are `text.decode(all ids)`. Each id costs a bounded time, whatever came before,
    except a run of byte tokens (SentencePiece), which is decoded once when it ends: its decoder shows either all of a
    run as characters or none of it.
    """

    def __init__(self, text: TextProcessor, stops: Iterable[str] = (), skip_special_tokens: bool = True) -> None:
        self._text = text
        self._skipped = text.special_ids if skip_special_tokens else frozenset[int]()
        self._stops = StopMatcher(stops)
        self._window: list[int] = []  # tokens of the last certain text, as context, then those not certain yet
        self._emitted = 0  # characters of the window's text that were passed on
        self._fresh = 0  # tokens at the window's end that came since the last certain text
        self._stopped: str | None = None

    def feed(self, ids: Iterable[int], matching: bool = True) -> TextPiece:
        """The text that became certain with `ids`. After a stop text was met, nothing more comes.

        Text that became certain without `matching` is passed on, and no stop text begins in it.
        """
        if self._stopped is not None:
            return TextPiece("", self._stopped)
        new = [id for id in ids if id not in self._skipped]
        if not new:
            return TextPiece("")
        self._window += new
        self._fresh += len(new)
        if new[-1] in self._text.byte_fallback_ids:
            return TextPiece("")
        text = self._certain_text()
        return self._match(text) if matching else TextPiece(text)

    def finish(self) -> TextPiece:
        """What is left once the last token came: half characters as U+FFFD, and what might have become a stop text."""
        if self._stopped is not None:
            return TextPiece("", self._stopped)
        rest = self._decode_window()[self._emitted :]
        self._window, self._emitted, self._fresh = [], 0, 0
        piece = self._match(rest)
        return piece if piece.stop is not None else TextPiece(piece.text + self._stops.flush())

    def _match(self, text: str) -> TextPiece:
        piece = self._stops.feed(text)
        self._stopped = piece.stop
        return piece

    def _decode_window(self) -> str:
        return self._text.decode(self._window, skip_special_tokens=False)

    def _certain_text(self) -> str:
        decoded = self._decode_window()
        # An unfinished character is one U+FFFD at the very end.
        certain = len(decoded) - decoded.endswith(_REPLACEMENT)
        text = decoded[self._emitted : certain]
        if certain == len(decoded):
            self._keep(self._fresh)
            self._emitted = len(self._decode_window())
            self._fresh = 0
        elif len(self._window) > 16:
            # At most three bytes are unfinished, and each token here is a byte at least.
            self._keep(4)
            self._emitted = len(self._decode_window()) - 1
        else:
            self._emitted = certain
        return text

    def _keep(self, count: int) -> None:
        self._window = self._window[-count:]


class StopMatcher:
    """Finds the first stop text to be completed in a stream of characters, and holds back what may become one. None of
    them is empty.

    Knuth, Morris and Pratt's automaton, one per stop text, so a character costs the number of stop texts whatever
    their length, and the outcome does not depend on how the stream was cut. Of several that one character completes,
    the longest counts.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str) -> TextPiece:
        """The text before a stop text, or what can no longer be part of one."""
        text = self._held + text
        if not self._stops:
            return TextPiece(text)
        for position in range(len(self._held), len(text)):
            for index, stop in enumerate(self._stops):
                if self._advance(index, text[position]) == len(stop):
                    self._held = ""
                    return TextPiece(text[: position + 1 - len(stop)], stop)
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return TextPiece(text[:certain])

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, character: str) -> int:
        stop, failures, matched = self._stops[index], self._failures[index], self._matched[index]
        while matched and stop[matched] != character:
            matched = failures[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest proper prefix that is its suffix too."""
    table = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[length] != stop[position]:
            length = table[length - 1]
        length += stop[length] == stop[position]
        table[position] = length
    return table


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that has a character of a span. Both are in order, so one pass does."""
    mask = [0] * len(offsets)
    current = 0
    for index, (start, end) in enumerate(offsets):
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        if current < len(spans) and start < spans[current][1] and end > spans[current][0]:
            mask[index] = 1
    return mask


def _without_paths(error: Exception) -> str:
    """What went wrong; the operating system's errors name files of the server's."""
    return (error.strerror or "unreadable") if isinstance(error, OSError) else str(error)


def _token_content(token: Any) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _default_template(template: Any) -> str | None:
    """tokenizer_config.json writes one template as text, several as a list of named ones."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        content = _token_content(entry)
        if content and content not in known:
            flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_tokens([AddedToken(content, special=bool(entry.get("special")), **flags)])
            known.add(content)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [_token_content(token) for token in (extra.values() if isinstance(extra, Mapping) else extra)]
    missing = [text for text in (*named.values(), *others) if text and text not in known]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in dict.fromkeys(missing)])


def _set_post_processor(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """add_bos_token and add_eos_token, where the configuration says them, win over tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    parts = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    tokens = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    tokenizer.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=tokens)


def _byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if '"ByteFallback"' not in json.dumps(decoder):
        return frozenset()
    return frozenset(id for token, id in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))
