"""graftwork adapter: upload, look at, load, unload, pin and delete adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from graftwork.cli import output
from graftwork.cli.confirm import Yes, confirm
from graftwork.cli.options import AdapterRef, Address, AsJson, subgroup
from graftwork.cli.progress import upload_bar
from graftwork.cli.session import session
from graftwork.client import Client
from graftwork.errors import NotFoundError
from graftwork.requests import adapters as requests
from graftwork.types import Adapter

AdapterId: TypeAlias = Annotated[str, typer.Argument(metavar="ID", help="The adapter.")]

app = subgroup("Adapters: everything servable by name beside the base model.")


@app.command()
def create(
    ctx: typer.Context,
    adapter_id: Annotated[str, typer.Argument(metavar="ID", help="The name to serve it by.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder such as PEFT's save_pretrained writes.")],
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="Who serves it; left out: recognised from the files.")
    ] = None,
    new_version: Annotated[
        bool, typer.Option("--new-version", help="If the adapter exists, publish its next version.")
    ] = False,
    load: Annotated[bool, typer.Option("--load", help="Load it at once.")] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Upload a folder and publish it as an adapter."""
    with session(ctx, address, as_json) as client:
        before = _newest(client, adapter_id) if new_version else None
        with upload_bar(adapter_id, as_json) as on_progress:
            adapter = client.adapters.create(
                adapter_id, directory, strategy=strategy, new_version=new_version, load=load, on_progress=on_progress
            )
        name = _name(adapter)
        same = adapter.version == before
        _show(adapter, as_json, f"nothing new: {name} has the same files" if same else f"published {name}")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False, address: Address = None) -> None:
    """List all adapters."""
    with session(ctx, address, as_json) as client:
        output.listing(
            list(client.adapters.list()),
            ("ADAPTER", "VERSION", "STRATEGY", "LOADED", "PINNED", "RANK", "SIZE", "CREATED"),
            lambda adapter: (adapter.adapter_id, adapter.version, adapter.strategy, *_state(adapter)),
            as_json,
        )


@app.command()
def versions(ctx: typer.Context, adapter_id: AdapterId, as_json: AsJson = False, address: Address = None) -> None:
    """List an adapter's versions, newest first. ID@VERSION serves one of them."""
    with session(ctx, address, as_json) as client:
        output.listing(
            list(client.adapters.versions(adapter_id)),
            ("VERSION", "STRATEGY", "LOADED", "PINNED", "RANK", "SIZE", "CREATED", "TUNING JOB"),
            lambda version: (_name(version), version.strategy, *_state(version), _job_id(version)),
            as_json,
        )


@app.command()
def show(ctx: typer.Context, adapter: AdapterRef, as_json: AsJson = False, address: Address = None) -> None:
    """Show an adapter."""
    with session(ctx, address, as_json) as client:
        _show(client.adapters.get(adapter), as_json)


@app.command()
def load(ctx: typer.Context, adapter: AdapterRef, as_json: AsJson = False, address: Address = None) -> None:
    """Load an adapter beside the base now. Its first request then need not wait."""
    with session(ctx, address, as_json) as client:
        loaded = client.adapters.load(adapter)
        _show(loaded, as_json, f"loaded {_name(loaded)}")


@app.command()
def unload(ctx: typer.Context, adapter: AdapterRef, as_json: AsJson = False, address: Address = None) -> None:
    """Take an adapter off the device. That ends its pin, if it has one. Its next request loads it again."""
    with session(ctx, address, as_json) as client:
        unloaded = client.adapters.unload(adapter)
        pin = "; it was pinned, and is no more" if unloaded.unpinned else ""
        output.say(unloaded, f"unloaded {_name(unloaded)}{pin}", as_json)


@app.command()
def pin(ctx: typer.Context, adapter: AdapterRef, as_json: AsJson = False, address: Address = None) -> None:
    """Load an adapter and keep it on the device. Over restarts too, until it is unpinned, unloaded or deleted."""
    with session(ctx, address, as_json) as client:
        pinned = client.adapters.pin(adapter)
        _show(pinned, as_json, f"pinned {_name(pinned)}")


@app.command()
def unpin(ctx: typer.Context, adapter: AdapterRef, as_json: AsJson = False, address: Address = None) -> None:
    """Let an adapter be evicted again when its room is needed."""
    with session(ctx, address, as_json) as client:
        unpinned = client.adapters.unpin(adapter)
        output.say(unpinned, f"unpinned {_name(unpinned)}", as_json)


@app.command()
def delete(
    ctx: typer.Context,
    adapter: AdapterRef,
    yes: Yes = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Delete an adapter with all its versions, or ID@VERSION alone. Asks first on a terminal."""
    adapter_id, at, _ = adapter.partition("@")
    with session(ctx, address, as_json) as client:
        requests.delete(adapter)  # a name that cannot be deleted, or is not there, is told before the question
        client.adapters.get(adapter)
        confirm(f"delete {adapter}?" if at else f"delete adapter {adapter} with all its versions?", yes)
        count = client.adapters.delete(adapter)
        if as_json:
            output.emit({"adapter_id": adapter_id, "deleted_versions": count})
        elif at:
            print(f"deleted {adapter}; {_left(client, adapter_id)}")
        else:
            print(f"deleted {adapter} ({count} version{'' if count == 1 else 's'})")


def _name(adapter: Adapter) -> str:
    return f"{adapter.adapter_id}@{adapter.version}"


def _newest(client: Client, adapter_id: str) -> int | None:
    try:
        return client.adapters.get(adapter_id).version
    except NotFoundError:
        return None


def _left(client: Client, adapter_id: str) -> str:
    newest = _newest(client, adapter_id)
    return f"it was the last version of {adapter_id}" if newest is None else f"{adapter_id} means version {newest} now"


def _state(adapter: Adapter) -> tuple[Any, ...]:
    """LOADED, PINNED, RANK, SIZE, CREATED."""
    size = output.size(adapter.size_bytes)
    return adapter.loaded, adapter.pinned, adapter.rank or None, size, adapter.create_time


def _job_id(adapter: Adapter) -> str:
    return adapter.tuning_job.removeprefix("tuningJobs/")


def _show(adapter: Adapter, as_json: bool, headline: str = "") -> None:
    if as_json:
        output.emit(adapter)
        return
    if headline:
        print(headline)
    pairs = [
        ("adapter", _name(adapter)),
        ("follows", f"{adapter.adapter_id}@{adapter.follows_version}" if adapter.follows_version else None),
        ("strategy", adapter.strategy),
        ("digest", adapter.digest),
        ("base", adapter.base_fingerprint),
        ("parameters", f"{adapter.parameter_count:,}"),
        ("rank", adapter.rank or None),
        ("size", output.size(adapter.size_bytes)),
        ("loaded", adapter.loaded),
        ("pinned", adapter.pinned),
        ("created", adapter.create_time),
        ("tuning job", adapter.tuning_job),
    ]
    report = adapter.load_report
    if report is not None:
        took = "was loaded already" if report.already_loaded else f"in {report.load_ms:.1f} ms"
        rank = f"rank {report.rank}, " if report.rank else ""
        pairs.append(("load", f"{report.modules_bound} modules, {rank}{output.size(report.device_bytes)}, {took}"))
    output.fields(pairs)
