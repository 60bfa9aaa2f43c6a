"""graftwork chat: a conversation on the terminal, or one message per line of stdin."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, TypeAlias

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, CacheSalt, Model, Priority
from graftwork.cli.sampling import takes_sampling
from graftwork.cli.session import session
from graftwork.errors import APIError, UnavailableError
from graftwork.requests.messages import Messages
from graftwork.requests.sampling import SamplingOptions
from graftwork.streams import GenerationStream
from graftwork.types import Generation, Message

Ask: TypeAlias = Callable[[Messages], GenerationStream]
"""Sends a conversation."""
_FULL = ("PROMPT_TOO_LONG", "KV_CACHE_TOO_SMALL")
"""Why the server takes no more of a conversation."""


@takes_sampling
def chat(
    ctx: typer.Context,
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    *,
    sampling: SamplingOptions,
    cache_salt: CacheSalt = None,
    priority: Priority = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit or Ctrl-D ends it.

    When stdin is not a terminal, each of its lines is one message. With --json, each answer is one line of JSON.
    """
    with session(ctx, address, as_json) as client:

        def ask(messages: Messages) -> GenerationStream:
            running: GenerationStream = client.chat(
                model, messages, stream=True, cache_salt=cache_salt, priority=priority, **sampling
            )
            return running

        _converse(ask, [Message(role="system", content=system)] if system else [], as_json)


def _converse(ask: Ask, opening: list[Message], as_json: bool) -> None:
    interactive = sys.stdin.isatty()
    history = list(opening)
    if interactive and not as_json:
        print("(/reset forgets the conversation, /exit or Ctrl-D ends it)", file=sys.stderr)
    for line in _lines(interactive, as_json):
        if line == "/exit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        turn = Message(role="user", content=line)
        try:
            answer = _answer(ask([*history, turn]), as_json)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(interrupted; the message is not kept)", file=sys.stderr)
            continue
        except (APIError, ValueError) as error:  # ValueError: a message that no request can hold
            # Someone at a terminal may go on with another message; a script must see the failure.
            if not interactive or isinstance(error, UnavailableError):
                raise
            print(f"error: {error}", file=sys.stderr)
            if history != opening and isinstance(error, APIError) and error.reason in _FULL:
                print("(the conversation has become too long; /reset begins a new one)", file=sys.stderr)
            continue
        history += [turn, Message(role="assistant", content=answer.text)]


def _lines(interactive: bool, as_json: bool) -> Iterator[str]:
    if not interactive:
        yield from (stripped for line in sys.stdin if (stripped := line.rstrip("\r\n")).strip())
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # line editing and recall for input()
    while True:
        try:
            line = input("" if as_json else "> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()  # the shell's prompt gets a line of its own
            raise
        if line:
            yield line


def _answer(running: GenerationStream, as_json: bool) -> Generation:
    with running as stream:
        if as_json:
            answer = stream.result()
            output.emit(answer)
            return answer
        output.stream(stream)
        return stream.result()
