"""graftwork chat: a conversation on the terminal, or one message per line of stdin."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import (
    Address,
    AsJson,
    Choice,
    FrequencyPenalty,
    JsonSchema,
    MaxTokens,
    MinP,
    MinTokens,
    Model,
    PresencePenalty,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from graftwork.cli.session import session
from graftwork.client import Client
from graftwork.errors import APIError, UnavailableError
from graftwork.requests import SamplingOptions
from graftwork.types import Generation, Message


def chat(
    ctx: typer.Context,
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    min_tokens: MinTokens = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit or Ctrl-D ends it.

    When stdin is not a terminal, each of its lines is one message. With --json, each answer is one line of JSON.
    """
    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        json_schema=json_schema.read_text("utf-8") if json_schema else None,
        regex=regex,
        choice=choice,
    )
    with session(ctx, address, as_json) as client:
        opening = [Message(role="system", content=system)] if system else []
        _converse(client, model, opening, options, as_json)


def _converse(client: Client, model: str, opening: list[Message], options: SamplingOptions, as_json: bool) -> None:
    interactive = sys.stdin.isatty()
    history = list(opening)
    for line in _lines(interactive, as_json):
        if line == "/exit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        turn = Message(role="user", content=line)
        try:
            answer = _answer(client, model, [*history, turn], options, as_json)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(interrupted; the message is not kept)", file=sys.stderr)
            continue
        except APIError as error:
            # Someone at a terminal may go on with another message; a script must see the failure.
            if not interactive or isinstance(error, UnavailableError):
                raise
            print(f"error: {error}", file=sys.stderr)
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
        if line:
            yield line


def _answer(client: Client, model: str, messages: list[Message], options: SamplingOptions, as_json: bool) -> Generation:
    if as_json:
        answer = client.chat(model, messages, **options)
        output.emit(answer)
        return answer
    with client.chat(model, messages, stream=True, **options) as stream:
        started = False
        try:
            for chunk in stream:
                started = True
                print(output.readable(chunk.text), end="", flush=True)
        finally:
            if started:
                print(flush=True)
        whole: Generation = stream.result()
        return whole
