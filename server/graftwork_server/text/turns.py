"""Where the assistant's turns lie in a rendered conversation: what a model would have written, and where it would end.

A template is a program that may do anything with a message: trim it, drop its reasoning, write another header before
it once more follows. So a conversation is rendered as it is, and once more with a word of our own in the place of each
assistant message. What the second rendering has between the words is the template's own text; found in the first one,
in order, it leaves what the template made of each message. What is found in no way or in several is refused. A last
message with reasoning that the template would leave out is put where serving asks for it.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence

import msgspec

from graftwork_server.errors import InvalidArgument
from graftwork_server.text.chat_template import Message, Span, Template

_THINK_END = "</think>"


class Turn(msgspec.Struct, frozen=True):
    """Characters [start, end) of a conversation that the assistant wrote. ended: its end token is the last of them."""

    start: int
    end: int
    ended: bool


class Conversation(msgspec.Struct, frozen=True):
    """A rendered conversation and the assistant's turns in it.

    served: characters that serving would send to have the last message written; None if that is not how it begins.
    """

    text: str
    turns: list[Turn]
    served: int | None


def read_conversation(template: Template, messages: Sequence[Message], ends: Sequence[str]) -> Conversation:
    """Renders `messages`. `ends`: texts of the tokens that end a turn.

    Raises InvalidArgument: CHAT_TEMPLATE_REJECTED, or CHAT_TEMPLATE_HIDES_TURN naming the message.
    """
    last = messages[-1].get("role") == "assistant"
    if template.marks_generation:
        text, blocks = template.render_with_spans(messages)
        turns = [_block_turn(text, block, ends) for block in blocks]
        prompt = _prompt(template, messages[:-1]) if last else None
        served = len(prompt) if prompt is not None and text.startswith(prompt) else None
        return _conversation(text, turns, last, served)
    text = template.render(messages, add_generation_prompt=False)
    contents = _contents(template, messages, text)
    turns = []
    served = None
    for index, (start, end) in contents.items():
        prompt = _prompt(template, messages[:index])
        if last and index == len(messages) - 1 and prompt is not None:
            text, start, end = _with_reasoning(text, start, end, prompt, str(messages[index]["content"]))
        served = len(prompt) if prompt is not None and text.startswith(prompt) else None
        turns.append(_turn(text, start if served is None else served, end, ends))
    return _conversation(text, turns, last, served)


def _conversation(text: str, turns: list[Turn], last: bool, served: int | None) -> Conversation:
    """`last`: the last message is the assistant's. Where no token ends it, what follows it comes before its end."""
    if not last:
        return Conversation(text, turns, None)
    if turns and not turns[-1].ended:
        turns = [*turns[:-1], Turn(turns[-1].start, len(text), ended=False)]
    return Conversation(text, turns, served)


def end_of_turn(template: Template, tokens: Sequence[str]) -> str | None:
    """The one of `tokens` that the template writes after an assistant's message, if it writes one."""
    word = _word()
    asked = [{"role": "user", "content": _word()}, {"role": "assistant", "content": word}]
    for messages in (asked, [{"role": "system", "content": _word()}, *asked]):
        try:
            text = template.render(messages, add_generation_prompt=False)
        except InvalidArgument:
            continue
        found = _end_at(text.rpartition(word)[2], 0, tokens) if word in text else None
        if found is not None:
            return text.rpartition(word)[2][:found].strip()
    return None


def _block_turn(text: str, block: Span, ends: Sequence[str]) -> Turn:
    """A model that is never shown the end of its turn does not stop, so a block that leaves it out is widened."""
    start, end = block
    if any(text[start:end].rstrip().endswith(token) for token in ends):
        return Turn(start, end, ended=True)
    return _turn(text, start, end, ends)


def _turn(text: str, start: int, end: int, ends: Sequence[str]) -> Turn:
    after = _end_at(text, end, ends)
    return Turn(start, end, ended=False) if after is None else Turn(start, after, ended=True)


def _end_at(text: str, position: int, ends: Sequence[str]) -> int | None:
    """Where the token ends that begins at `position`, white space passed over, if it is one of `ends`."""
    while position < len(text) and text[position].isspace():
        position += 1
    found = max((len(token) for token in ends if token and text.startswith(token, position)), default=0)
    return position + found if found else None


def _prompt(template: Template, before: Sequence[Message]) -> str | None:
    """What serving sends for the message that follows `before`; None if the template takes no such conversation."""
    try:
        return template.render(before, add_generation_prompt=True)
    except InvalidArgument:  # no template must take a conversation without messages, or two users in a row
        return None


def _with_reasoning(text: str, start: int, end: int, prompt: str, content: str) -> tuple[str, int, int]:
    """The text and the span of its last message where serving opens the reasoning and the message goes on with it.

    Templates leave the reasoning out of a finished conversation. A model that is to learn it has to be shown it where
    it will be asked for it.
    """
    opening = prompt.removeprefix(text[:start])
    written = content.lstrip()
    if opening == prompt or text.startswith(prompt) or not opening.strip() or not written.startswith(opening.strip()):
        return text, start, end
    rest = written.removeprefix(opening.strip())
    if opening[-1].isspace():
        rest = rest.lstrip()
    return f"{prompt}{rest}{text[end:]}", len(prompt), len(prompt) + len(rest)


def _contents(template: Template, messages: Sequence[Message], text: str) -> dict[int, Span]:
    """What `text` has of each assistant message, by the message's index."""
    indices = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    reason = ""
    for fill in (_whole, _after_reasoning, _within_space):
        words = [_word() for _ in indices]
        filled = list(messages)
        for index, word in zip(indices, words, strict=True):
            filled[index] = {**messages[index], "content": fill(str(messages[index]["content"]), word)}
        try:
            frame = template.render(filled, add_generation_prompt=False)
        except InvalidArgument:
            continue
        odd = next((i for i, word in zip(indices, words, strict=True) if frame.count(word) != 1), None)
        if odd is not None:
            times = "more than once" if frame.count(words[indices.index(odd)]) else "not at all"
            reason = reason or f"the chat template shows assistant message {odd + 1} {times}"
            continue
        pieces = _cut(frame, words)
        contents = [str(messages[index]["content"]) for index in indices]
        spans = _literal(text, pieces, contents) or _between(text, pieces)
        if spans is not None:
            return dict(zip(indices, spans, strict=True))
    reason = reason or "the chat template does not show where the assistant's messages begin and end"
    raise InvalidArgument(
        f"{reason}. Use a template with {{% generation %}} blocks, or rows of prompt and completion",
        reason="CHAT_TEMPLATE_HIDES_TURN",
        field="messages",
    )


def _whole(content: str, word: str) -> str:
    return word


def _after_reasoning(content: str, word: str) -> str:
    """Templates that look for reasoning in a message find it."""
    reasoning, mark, answer = content.rpartition(_THINK_END)
    space = answer[: len(answer) - len(answer.lstrip())]
    return f"{reasoning}{mark}{space}{word}"


def _within_space(content: str, word: str) -> str:
    stripped = content.strip()
    before, _, after = content.partition(stripped)
    return f"{before}{word}{after}"


def _cut(frame: str, words: Sequence[str]) -> list[str]:
    pieces = []
    for word in words:
        piece, _, frame = frame.partition(word)
        pieces.append(piece)
    return [*pieces, frame]


def _literal(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Spans between the template's pieces, each message written as it is or without space or reasoning."""
    position = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    spans = []
    for content, piece in zip(contents, pieces[1:], strict=True):
        written = next((form for form in _forms(content) if text.startswith(form + piece, position)), None)
        if written is None:
            return None
        spans.append((position, position + len(written)))
        position += len(written) + len(piece)
    return spans if position == len(text) else None


def _forms(content: str) -> Iterator[str]:
    answer = content.rpartition(_THINK_END)[2]
    for form in (content, answer):
        yield from (form, form.strip(), form.lstrip(), form.rstrip(), form.lstrip("\n"), form.strip("\n"))


def _between(text: str, pieces: Sequence[str]) -> list[Span] | None:
    """Spans between the template's pieces, whatever is there; None unless there is exactly one way to find them."""
    first, *middle, last = pieces
    begin, end = len(first), len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last) and begin <= end):
        return None
    leftmost, position = [], begin
    for piece in middle:
        found = text.find(piece, position, end)
        if found < 0:
            return None
        leftmost.append(found)
        position = found + len(piece)
    position = end
    for piece, found in zip(reversed(middle), reversed(leftmost), strict=True):
        if text.rfind(piece, begin, position) != found:
            return None
        position = found
    borders = [begin, *itertools.chain(*((found, found + len(p)) for found, p in zip(leftmost, middle, strict=True)))]
    borders.append(end)
    return list(zip(borders[::2], borders[1::2], strict=True))


def _word() -> str:
    """Text that stands nowhere else, and that no template takes for anything but text."""
    return f"x{secrets.token_hex(12)}"
