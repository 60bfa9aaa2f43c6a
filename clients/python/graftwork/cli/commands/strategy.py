"""graftwork strategy: the plugins that train and serve."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, subgroup
from graftwork.cli.session import session
from graftwork.types import Strategy

app = subgroup("Strategies: the plugins that train and serve variants.")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False, address: Address = None) -> None:
    """List all strategies, those that failed to load included."""
    with session(ctx, address, as_json) as client:
        strategies = list(client.strategies.list())
        output.listing(strategies, ("STRATEGY", "VERSION", "CAN", "FROM", "ABOUT"), _row, as_json)


@app.command()
def show(
    ctx: typer.Context,
    strategy: Annotated[str, typer.Argument(metavar="ID", help="The strategy.")],
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Show a strategy and its settings, with their defaults."""
    with session(ctx, address, as_json) as client:
        item = client.strategies.get(strategy)
        if as_json:
            output.emit(item)
            return
        output.fields(
            (
                ("strategy", item.strategy_id),
                ("version", item.version),
                ("contract", item.api_version),
                ("from", item.distribution),
                ("can", ", ".join(item.capabilities)),
                ("about", item.description),
                ("load error", item.load_error),
            )
        )
        settings = item.config_schema.get("properties")
        if isinstance(settings, dict) and settings:
            required = item.config_schema.get("required", [])
            rows = [_setting(name, about, name in required) for name, about in settings.items()]
            print()
            output.table(("SETTING", "DEFAULT", "ABOUT"), rows)


def _row(item: Strategy) -> tuple[str, ...]:
    about = f"NOT LOADED: {item.load_error}" if item.load_error else item.description
    return item.strategy_id, item.version, ",".join(item.capabilities), item.distribution, about


def _setting(name: str, about: object, required: bool) -> tuple[str, str, str]:
    if not isinstance(about, dict):  # JSON schema allows true and false here
        return name, "", ""
    default = json.dumps(about["default"]) if "default" in about else "(required)" if required else ""
    return name, default, str(about.get("description") or about.get("type") or "")
