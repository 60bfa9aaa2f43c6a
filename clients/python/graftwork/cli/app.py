"""The command tree, the options before the command, and what --help says about exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli import adapter, chat, dataset, generate, pooled, serve, status, strategy, tune
from graftwork.transport.settings import DEFAULT_ADDRESS
from graftwork.version import VERSION

_EPILOG = """\b
Exit codes:
  0    done
  1    the request failed, or what was checked is not valid
  2    bad usage: wrong arguments, or a file that cannot be sent
  3    server unreachable
  4    no such adapter, version, data set, job or strategy
  5    the tuning job failed or was cancelled
  130  interrupted
  141  the reader of the output went away
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=_EPILOG,
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
app.command()(generate.score)
app.command()(pooled.classify)
app.command()(pooled.embed)
app.add_typer(adapter.app, name="adapter")
app.add_typer(strategy.app, name="strategy")
app.add_typer(tune.app, name="tune")
app.add_typer(dataset.app, name="dataset")
