"""graftwork status: what the server serves, and what goes on."""

from __future__ import annotations

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson
from graftwork.cli.session import session
from graftwork.types import ServerInfo, TuningJobInfo

_SHOWN_VERSIONS = 12
"""Loaded versions that are named."""
_SHOWN = ("python", "torch", "transformers", "peft", "grpcio")
"""What it runs on, as far as a line has room; --json has all."""


def status(ctx: typer.Context, as_json: AsJson = False, address: Address = None) -> None:
    """Show what the server serves and does. Base model, limits, what is loaded, what waits and runs, versions."""
    with session(ctx, address, as_json) as client:
        server = client.server.get()
        if as_json:
            output.emit(server)
            return
        _print(server, client.address)


def _print(server: ServerInfo, address: str) -> None:
    base, limits = server.base_model, server.limits
    quantised = "" if base.quantization == "none" else f", {base.quantization}"
    size = output.size(base.weight_bytes)
    kind = "" if base.generates else ", an encoder: it classifies and embeds"
    kv_cache = f"{limits.kv_cache_tokens:,} tokens" if base.generates else None
    output.fields(
        (
            ("server", f"{address}, graftwork {server.version}"),
            ("since", server.start_time),
            ("engine", "answers" if server.engine_ready else "is being started again"),
            ("base", f"{base.display_name} ({base.architecture}, {base.parameter_count:,} parameters{kind})"),
            ("weights", f"{size}, {base.dtype} on {base.device}{quantised}"),
            ("fingerprint", base.fingerprint),
            ("context", f"{base.context_tokens:,} tokens"),
            ("KV cache", kv_cache),
            ("sequences", f"{server.sequence_count:,} wait or run, of at most {limits.max_queue:,}"),
            ("batch", f"at most {limits.max_sequences} sequences, {limits.max_step_tokens:,} tokens a step"),
            ("adapters", f"{server.adapter_count:,}"),
            ("loaded", _loaded(server.loaded_versions)),
            ("jobs", f"{server.job_count:,} not ended, at most {limits.max_concurrent_jobs} at once"),
            (
                "uploads",
                f"at most {output.size(limits.max_upload_bytes)} an adapter, "
                f"{output.size(limits.max_dataset_bytes)} a data set",
            ),
            ("runs on", ", ".join(f"{name} {server.versions[name]}" for name in _SHOWN if name in server.versions)),
        )
    )
    if server.jobs:
        print()
        output.table(("JOB", "STATE", "STRATEGY", "ADAPTER", "STEP"), map(_job, server.jobs))


def _loaded(names: tuple[str, ...]) -> str:
    shown = [name.removeprefix("adapters/").replace("/versions/", "@") for name in names[:_SHOWN_VERSIONS]]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _job(job: TuningJobInfo) -> tuple[str | None, ...]:
    return job.job_id, job.state, job.spec.strategy, job.spec.adapter_id, output.step(job.progress)
