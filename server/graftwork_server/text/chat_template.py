"""Chat templates: the Jinja dialect of Hugging Face tokenizers, rendered in a sandbox, without transformers.

The dialect (the environment's options, `raise_exception`, `strftime_now`, `tojson`, `{% generation %}` blocks) is the
one of transformers' `apply_chat_template`, so that a template gives the same text here and there; a test compares them.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from graftwork_server.errors import FailedPrecondition, InvalidArgument

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MARK = "_graftwork_generation_mark"


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what a model would have written.

    Where the context holds a mark, the block's text is put between two of it. A mark is random per rendering, so no
    message can contain it, and unlike a counter on the environment it survives macros and concurrent renderings.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(
            self.call_method("_block", [jinja2.nodes.ContextReference()]), [], [], body
        ).set_lineno(lineno)

    def _block(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        mark = context.get(_MARK, "")
        return f"{mark}{caller()}{mark}"


class _TemplateDict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _TemplateDict()
    return environment


class Template(Protocol):
    """What renders conversations: ChatTemplate, or one of a stranger's with bounds (helper_main.py)."""

    marks_generation: bool
    """Whether the template says itself what the assistant writes."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as text."""

    def render_unfinished(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation up to where the last message's content ends."""

    def render_with_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of its generation blocks, in order."""


class ChatTemplate:
    """One compiled template. Safe to use from several threads.

    `variables` are the names that a template may use beside `messages`: bos_token, eos_token and their like.
    Raises FailedPrecondition (CHAT_TEMPLATE_BROKEN) if `source` is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise FailedPrecondition(
                f"the chat template cannot be compiled: {error}", reason="CHAT_TEMPLATE_BROKEN"
            ) from error
        self._variables = dict(variables)
        self.marks_generation = _GENERATION_BLOCK.search(_COMMENT.sub("", source)) is not None
        """Whether the template says itself what the assistant writes."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as text. Raises InvalidArgument (CHAT_TEMPLATE_REJECTED) with the template's own message."""
        context = {"tools": None, "documents": None, **self._variables, **variables}
        try:
            return self._template.render(
                messages=[_prepare(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **context,
            )
        except MemoryError:
            raise  # whoever bounds it says so
        except Exception as error:  # A template is a program: on messages it was not written for, it may fail anyhow.
            detail = str(error) or type(error).__name__
            raise InvalidArgument(
                f"the chat template does not accept these messages: {detail}",
                reason="CHAT_TEMPLATE_REJECTED",
                field="messages",
            ) from error

    def render_unfinished(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation up to where the last message's content ends, so that it can be continued.

        Where the template takes white space off a message's end, it is taken off here too, as transformers'
        `continue_final_message` does. Raises InvalidArgument if the content is not in what the template renders.
        """
        # The space at the mark's end tells whether the template strips.
        mark = f"{secrets.token_hex(16)} "
        *before, last = messages
        unfinished = {**last, "content": f"{last['content']}{mark}"}
        text = self.render([*before, unfinished], add_generation_prompt=False, **variables)
        position = text.rfind(mark.strip(" "))
        if position < 0:
            raise InvalidArgument(
                "the chat template does not render the last message's content, so it cannot be continued",
                reason="CHAT_TEMPLATE_REJECTED",
                field="continue_final_message",
            )
        kept = text[:position]
        return kept if text.startswith(mark, position) else kept.rstrip()

    def render_with_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of its generation blocks, in order."""
        mark = f"\x00{secrets.token_hex(16)}\x00"
        pieces = self.render(messages, add_generation_prompt=False, **variables, **{_MARK: mark}).split(mark)
        spans: list[Span] = []
        position = 0
        for index, piece in enumerate(pieces):
            if index % 2:
                spans.append((position, position + len(piece)))
            position += len(piece)
        return "".join(pieces), spans


def _prepare(message: Message) -> dict[str, Any]:
    """A copy for the template: no empty keys, and reasoning under the names that templates read."""
    prepared = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[key] for key in _REASONING_FIELDS if key in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    return prepared
