"""graftwork generate and graftwork score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import (
    Address,
    AsJson,
    CacheSalt,
    Choice,
    FrequencyPenalty,
    JsonSchema,
    MaxTokens,
    MinP,
    MinTokens,
    Model,
    PresencePenalty,
    Priority,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from graftwork.cli.session import session
from graftwork.requests import SamplingOptions
from graftwork.streams import GenerationStream
from graftwork.types import Completion, TokenLogprob

TokenIds = Annotated[
    str | None, typer.Option("--token-ids", metavar="1,2,3", help="Token ids instead of a prompt, taken as they are.")
]


def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    token_ids: TokenIds = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Show so many most likely tokens at each step, 0: the chosen one.")
    ] = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    min_tokens: MinTokens = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    n: Annotated[int | None, typer.Option("--n", help="Completions to return.")] = None,
    best_of: Annotated[int | None, typer.Option("--best-of", help="Sample so many and return the best N.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Begin with the prompt.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    cache_salt: CacheSalt = None,
    priority: Priority = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Continue a prompt; the text is printed as it comes."""
    given = _prompt(prompt, token_ids)
    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        n=n,
        best_of=best_of,
        echo=echo,
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
        if as_json or (n or 1) > 1:
            answer = client.generate(model, given, cache_salt=cache_salt, priority=priority, **options)
            if as_json:
                output.emit(answer)
            else:
                _print_completions(answer.completions)
        else:
            _print_stream(
                client.generate(model, given, stream=True, cache_salt=cache_salt, priority=priority, **options)
            )


def _print_stream(running: GenerationStream) -> None:
    with running as stream:
        started = False
        try:
            for chunk in stream:
                started = True
                print(output.readable(chunk.text), end="", flush=True)
        finally:
            if started:
                print(flush=True)  # also when interrupted: the shell's prompt belongs on a line of its own
        logprobs = stream.result().logprobs
    if logprobs is not None:
        print()
        _print_logprobs(logprobs)


def _print_completions(completions: Sequence[Completion]) -> None:
    """Several come mixed, so they are printed when all have ended."""
    for completion in completions:
        score = "" if completion.score is None else f"  score {completion.score:.4f}"
        print(f"--- {completion.index}{score}")
        print(output.readable(completion.text))
        if completion.logprobs is not None:
            _print_logprobs(completion.logprobs)


def _prompt(prompt: str | None, token_ids: str | None) -> str | list[int]:
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give either a PROMPT or --token-ids")
    if token_ids is None:
        assert prompt is not None
        return prompt
    try:
        return [int(part) for part in token_ids.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{token_ids!r} is not a list of token ids such as 1,2,3") from None


def score(
    ctx: typer.Context,
    model: Model,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to score.")] = None,
    token_ids: TokenIds = None,
    top_logprobs: Annotated[
        int, typer.Option("--top-logprobs", help="Show so many most likely tokens at each position, 0 to 20.")
    ] = 0,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Show the log probability of every token of a text."""
    given = _prompt(text, token_ids)
    with session(ctx, address, as_json) as client:
        result = client.score(model, given, top_logprobs=top_logprobs)
        if as_json:
            output.emit(result)
            return
        _print_logprobs(result.tokens)
        print(f"total {result.total_logprob:.6f} ({len(result.tokens)} tokens, {_who(result.model, result.version)})")


def _print_logprobs(entries: Sequence[TokenLogprob]) -> None:
    rows = []
    for entry in entries:
        top = " ".join(f"{item.text!r}:{item.logprob:.4f}" for item in entry.top)
        rows.append((entry.token_id, repr(entry.text), "-" if entry.logprob is None else f"{entry.logprob:.6f}", top))
    header: tuple[str, ...] = ("token", "text", "logprob", "most likely")
    with_top = any(entry.top for entry in entries)
    output.table(header if with_top else header[:3], rows if with_top else [row[:3] for row in rows])


def _who(model: str, version: int) -> str:
    return f"{model}@{version}" if version else model
