"""TextProcessor: one model's tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Encoding, Tokenizer

from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument
from graftwork_server.text.chat_template import ChatTemplate, Message, Span, Template
from graftwork_server.text.files import (
    DEFAULT_TEMPLATE,
    NO_FACTS,
    TOOL_TEMPLATE,
    ModelFacts,
    TokenizerFiles,
    add_missing_tokens,
    named_tokens,
    templates_of,
)
from graftwork_server.text.turns import Turn, end_of_turn, read_conversation

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TOKEN_TEXTS = 65_536
"""Tokens whose text is remembered."""
_BEFORE = ("\n", "0", ".", "a", " ")
"""Texts that one is put after to see its tokens within a text; the first that shares no token with it is taken."""

CompileTemplate = Callable[[str, Mapping[str, str]], Template]
"""From a chat template's source and variables to what renders it; ChatTemplate's signature."""


class TaughtConversation(msgspec.Struct, frozen=True):
    """Token ids of a conversation, 1 in `mask` for each that the assistant writes, and whether the last of its messages
    ends with the token that ends a turn."""

    ids: list[int]
    mask: list[int]
    ended: bool


class TextProcessor:
    """The base model's tokenizer and chat templates. Safe to use from several threads.

    `tokenizer` is changed: truncation and padding are switched off and the special tokens that `config`
    (tokenizer_config.json) names are added, as transformers does when it loads the same files. `chat_template`: one, or
    several by name. `facts`: of the base model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None,
        compile_template: CompileTemplate = ChatTemplate,
        facts: ModelFacts = NO_FACTS,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_templates = templates_of(chat_template)
        """Sources by name."""
        self.facts = facts
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.named_tokens = named_tokens(config)
        """bos_token, eos_token, ... as far as the model has them."""
        add_missing_tokens(tokenizer, config, self.named_tokens)
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in self._added.items() if token.special)
        """Ids that decode() leaves out."""
        self.byte_fallback_ids = _byte_fallback_ids(tokenizer)
        """Ids of the tokens that stand for one byte of a character outside the vocabulary."""
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._token_text = lru_cache(_TOKEN_TEXTS)(self._make_token_text)
        self._templates: dict[str, Template | GraftworkServerError] = {}
        for name in (DEFAULT_TEMPLATE, TOOL_TEMPLATE):
            if name in self.chat_templates:
                try:
                    self._templates[name] = compile_template(self.chat_templates[name], self.named_tokens)
                except GraftworkServerError as error:
                    self._templates[name] = error  # Everything but chat works without it.

    @classmethod
    def from_dir(cls, path: str | Path) -> TextProcessor:
        """Reads the tokenizer's files in `path`. Raises FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID)."""
        return cls.from_files(TokenizerFiles.of(Path(path)))

    @classmethod
    def from_files(
        cls,
        files: TokenizerFiles,
        compile_template: CompileTemplate = ChatTemplate,
        default_template: str | Mapping[str, str] | None = None,
        tokenizer: Tokenizer | None = None,
        facts: ModelFacts | None = None,
    ) -> TextProcessor:
        """Reads the files; `default_template` is for those that bring none, `tokenizer` what was made of its file,
        `facts` what is known of the base model, where no file says it.

        Raises FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID).
        """
        if files.tokenizer is None:
            raise FailedPrecondition(
                "the model brings no tokenizer.json; only token ids can be used with it", reason="TOKENIZER_MISSING"
            )
        try:
            tokenizer = tokenizer or Tokenizer.from_file(str(files.tokenizer))
            config = files.read_config()
            templates = files.read_templates(config) or default_template
            return cls(tokenizer, config, templates, compile_template, facts or files.read_facts())
        except (GraftworkServerError, MemoryError):
            raise  # of memory, whoever bounds it says so
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

    def encode_following(self, text: str) -> list[int]:
        """Token ids of `text` where it does not begin a text: many tokenizers put a space before one that does."""
        return self._following(text, accepted=lambda ids: True)[0]

    def encode_completion(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Token ids of `prompt` as `encode` has them, which is how it is served, and those of what continues it.

        The two together are the tokens of the joined text, unless a token of that would reach across the border: then
        the completion is cut as it would be after another text.
        """
        ids, _, count = self._joined(prompt, completion, add_special_tokens=True)
        return ids[:count], ids[count:]

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
    def end_of_sequence_id(self) -> int | None:
        """Id of the token that ends a text: the tokenizer's, or where that names none, the model's first."""
        eos = self.eos_token_id
        return eos if eos is not None else next(iter(self.facts.eos_token_ids), None)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """Id of the token that the chat template writes after an assistant's message; None if it writes none."""
        template = self._templates.get(DEFAULT_TEMPLATE)
        if template is None or isinstance(template, GraftworkServerError):
            return None
        texts = [token.content for token in self._added.values() if token.content.strip()]
        end = end_of_turn(template, texts)
        return None if end is None else self.token_id(end)

    @property
    def has_chat_template(self) -> bool:
        """Whether render_chat and encode_chat can work."""
        template = self._templates.get(DEFAULT_TEMPLATE)
        return template is not None and not isinstance(template, GraftworkServerError)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as the model reads it; with `add_generation_prompt`, up to where its answer begins.

        Raises InvalidArgument (CHAT_TEMPLATE_REJECTED) if the template does not take these messages, and
        FailedPrecondition (NO_CHAT_TEMPLATE, CHAT_TEMPLATE_BROKEN) if there is none to use.
        """
        template = self._chat_template(with_tools=variables.get("tools") is not None)
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
            template = self._chat_template(with_tools=tools is not None)
            return self.encode_plain(template.render_unfinished(messages, tools=tools))
        return self.encode_plain(self.render_chat(messages, add_generation_prompt, tools=tools))

    def encode_taught_chat(self, messages: Sequence[Message]) -> TaughtConversation:
        """A conversation to learn from: what the assistant writes is its content and the token that ends its turn.

        The template's generation blocks say where that is, if it has them; see text/turns.py for those without. Up to
        where the last message begins, the tokens are those that serving sends, if the template shows them at all.
        Raises InvalidArgument (CHAT_TEMPLATE_REJECTED, CHAT_TEMPLATE_HIDES_TURN).
        """
        conversation = read_conversation(self._chat_template(), messages, self._end_texts)
        text, served = conversation.text, conversation.served or 0
        ids, offsets, _ = self._joined(text[:served], text[served:], add_special_tokens=False)
        spans = [(turn.start, turn.end) for turn in conversation.turns]
        return TaughtConversation(ids, _mask(offsets, spans), _ended(conversation.turns))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text or an assistant's turn: the tokenizer's, the base model's and the chat template's."""
        ids = (self.end_of_turn_id, self.eos_token_id, *self.facts.eos_token_ids)
        return frozenset(id for id in ids if id is not None)

    def end_tokens(self) -> list[int]:
        """end_ids as a list, in order."""
        return sorted(self.end_ids)

    @cached_property
    def _end_texts(self) -> list[str]:
        return [text for id in self.end_ids if (text := self._tokenizer.id_to_token(id))]

    def _joined(self, first: str, second: str, add_special_tokens: bool) -> tuple[list[int], list[Span], int]:
        """Token ids of the two texts, the characters of each in the joined text, and how many are those of `first`."""
        alone = self._encode(first, add_special_tokens)
        whole = self._encode(first + second, add_special_tokens)
        count = len(alone.ids)
        if whole.ids[:count] == alone.ids:
            return whole.ids, whole.offsets, count
        plain = self.encode_plain(first)
        text = self.decode(self.encode_plain(first + second), skip_special_tokens=False)
        ids, offsets = self._following(
            second, accepted=lambda ids: self.decode([*plain, *ids], skip_special_tokens=False) == text
        )
        shifted = [(start + len(first), end + len(first)) for start, end in offsets]
        return alone.ids + ids, alone.offsets + shifted, count

    def _following(self, text: str, accepted: Callable[[list[int]], bool]) -> tuple[list[int], list[Span]]:
        """Tokens of `text` within a text, and their characters; the first such that is accepted, if any is."""
        best: tuple[list[int], list[Span]] | None = None
        for before in _BEFORE:
            encoding = self._encode(before + text, add_special_tokens=False)
            size = len(before)
            first = next((i for i, (_, end) in enumerate(encoding.offsets) if end > size), len(encoding.ids))
            if first < len(encoding.ids) and encoding.offsets[first][0] < size:
                continue  # one token for both
            found = encoding.ids[first:], [(start - size, end - size) for start, end in encoding.offsets[first:]]
            if accepted(found[0]):
                return found
            best = best or found
        if best is not None:
            return best
        alone = self._encode(text, add_special_tokens=False)
        return alone.ids, alone.offsets

    def _encode(self, text: str, add_special_tokens: bool, pair: str | None = None) -> Encoding:
        try:
            return self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError) as error:  # lone surrogates, as JSON's "\ud800" gives them
            raise InvalidArgument("the text is not valid Unicode", reason="TEXT_INVALID", field="text") from error

    def _chat_template(self, with_tools: bool = False) -> Template:
        """As transformers chooses among several: "tool_use" with tools, "default" without."""
        named = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in self._templates else DEFAULT_TEMPLATE
        template = self._templates.get(named)
        if isinstance(template, GraftworkServerError):
            raise template
        if template is None:
            others = ", ".join(sorted(self.chat_templates))
            has = f'no chat template named "default", only: {others}' if others else "no chat template"
            raise FailedPrecondition(
                f"the base model has {has}; use Generate with a prompt, or rows of prompt and completion",
                reason="NO_CHAT_TEMPLATE",
            )
        return template


def _ended(turns: Sequence[Turn]) -> bool:
    return bool(turns) and turns[-1].ended


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


def _byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if '"ByteFallback"' not in json.dumps(decoder):
        return frozenset()
    return frozenset(id for token, id in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))
