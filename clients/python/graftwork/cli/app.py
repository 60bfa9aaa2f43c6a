"""The command tree, the options before the command."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli.commands import (
    adapter,
    chat,
    classify,
    dataset,
    embed,
    generate,
    score,
    serve,
    status,
    strategy,
    tune,
)
from graftwork.cli.exit_codes import EXPLAINED
from graftwork.transport.settings import DEFAULT_ADDRESS
from graftwork.version import VERSION

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXPLAINED,
    help="One base model, many variants hot-loaded onto it, served and tuned by name.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graftwork {VERSION}")
        raise typer.Exit


@app.callback()
def _before(
    ctx: typer.Context,
    address: Annotated[
        str,
        typer.Option(
            envvar="GRAFTWORK_ADDRESS", metavar="HOST:PORT", help="The server; every command takes this option, too."
        ),
    ] = DEFAULT_ADDRESS,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    ctx.obj = address


app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)(serve.serve)
app.command()(status.status)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(score.score)
app.command()(classify.classify)
app.command()(embed.embed)
app.add_typer(adapter.app, name="adapter")
app.add_typer(strategy.app, name="strategy")
app.add_typer(tune.app, name="tune")
app.add_typer(dataset.app, name="dataset")
