"""graftwork generate: a prompt goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, CacheSalt, Model, Priority, TokenIds, prompt_of
from graftwork.cli.sampling import takes_sampling
from graftwork.cli.session import session
from graftwork.requests.sampling import SamplingOptions
from graftwork.streams import GenerationStream
from graftwork.types import Completion


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
    given = prompt_of(prompt, token_ids, "PROMPT")
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
        output.stream(stream)
        logprobs = stream.result().logprobs
    if logprobs is not None:
        print()
        output.logprobs(logprobs)


def _print_completions(completions: Sequence[Completion]) -> None:
    """Several come mixed, so they are printed when all have ended."""
    for completion in completions:
        score = "" if completion.score is None else f"  score {completion.score:.4f}"
        print(f"--- {completion.index}{score}")
        print(output.readable(completion.text))
        if completion.logprobs is not None:
            output.logprobs(completion.logprobs)
