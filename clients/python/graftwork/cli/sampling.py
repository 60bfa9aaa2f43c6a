"""The options that generate and chat share, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwork.requests.sampling import SamplingOptions


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose argument `sampling` is filled from the options of _sampling, which stand in its place."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(_sampling, eval_str=True).parameters

    @functools.wraps(command)
    def filled(**given: Any) -> None:
        sampling = _sampling(**{name: given.pop(name) for name in shared})
        command(**given, sampling=sampling)

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        parameters += shared.values() if name == "sampling" else [parameter]
    # Typer reads both: names and defaults here, what they are there.
    filled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    filled.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return filled


def _sampling(
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Most tokens to generate.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 (the default) takes the most likely token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Nucleus mass in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample among so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of this request.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the generation; may be repeated.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Sample only tokens this share as likely as the most likely one.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: tokens that were there become less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option("--presence-penalty", help="Taken from each token that the completion has.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option("--frequency-penalty", help="The same, for each time that it has it.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option("--min-tokens", help="Tokens before any end.")] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            "--json-schema",
            metavar="FILE",
            help="A JSON schema that the output must follow.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Pattern that the whole output must match.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", metavar="TEXT", help="A text to choose from; may be repeated.")
    ] = None,
) -> SamplingOptions:
    return SamplingOptions(
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
        json_schema=_text_of(json_schema) if json_schema else None,
        regex=regex,
        choice=choice,
    )


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"--json-schema {file}: not UTF-8") from None
