"""graftwork generate and graftwork score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, CacheSalt, Model, Priority
from graftwork.cli.sampling import takes_sampling
from graftwork.cli.session import session
from graftwork.requests.sampling import SamplingOptions
from graftwork.streams import GenerationStream
from graftwork.types import Completion, TokenLogprob

TokenIds = Annotated[
    str | None, typer.Option("--token-ids", metavar="1,2,3", help="Token ids instead of a prompt, taken as they are.")
]


@takes_sampling
def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    token_ids: TokenIds = None,
    *,
    sampling: SamplingOptions,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Show so many most likely tokens at each step, 0: the chosen one.")
    ] = None,
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
    given = _prompt(prompt, token_ids, "PROMPT")
    options: SamplingOptions = {
        **sampling,
        "logprobs": logprobs,
        "ignore_eos": ignore_eos,
        "n": n,
        "best_of": best_of,
        "echo": echo,
    }
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
                print(flush=True)  # also when interrupted: the shell's prompt gets a line of its own
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


def _prompt(prompt: str | None, token_ids: str | None, argument: str) -> str | list[int]:
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter(f"give either {argument} or --token-ids")
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
    given = _prompt(text, token_ids, "TEXT")
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
