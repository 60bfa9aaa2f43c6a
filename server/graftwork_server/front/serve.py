"""`graftwork serve`: starts front and engine, serves, drains, ends.

Exit codes: 0 after a drain, or when told to end before it served; 1 if the server cannot start or go on; 2 for settings
that cannot be used. Each failure and each wrong setting is one line on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork_server import logs
from graftwork_server.config import ServerConfig
from graftwork_server.config_sources import ConfigError, load_config
from graftwork_server.errors import GraftworkServerError
from graftwork_server.front.front import Front
from graftwork_server.front.rpc.server import ListenError, resolve_listen
from graftwork_server.process import signals
from graftwork_server.types import ModelInfo

log = logging.getLogger("graftwork.server")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Runs the server until a signal ends it; returns the exit code."""
    try:
        loaded = load_config(sys.argv[1:] if argv is None else argv, environ)
    except ConfigError as error:
        return max(_fail(problem, 2) for problem in error.problems)
    if loaded.print_only:
        sys.stdout.write(loaded.to_toml())
        return 0
    logs.set_up(loaded.config.log_level, loaded.config.log_format)
    try:
        address = resolve_listen(loaded.config.listen, loaded.config.insecure)
    except ListenError as error:
        return _fail(str(error), 2)
    try:
        return asyncio.run(serve(loaded.config, address))
    except (ListenError, GraftworkServerError) as error:
        return _fail(str(error), 1)


async def serve(config: ServerConfig, address: str) -> int:
    """Starts everything, waits for a signal or for the engine to be given up, and ends everything."""
    stop_requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals.EXIT_CODES:
        loop.add_signal_handler(number, _on_signal, stop_requested)
    front = Front(config)
    try:
        starting = asyncio.ensure_future(front.start(address))
        if not await _first(starting, stop_requested):
            return 0
        bound = starting.result()
        print(_greeting(front.engine.model, config.base_name, bound), flush=True)
        if await _first(front.engine.failure, stop_requested):
            return _fail(front.engine.failure.result().message, 1)
        log.info("draining; a second signal ends at once")
        await front.drain()
        return 0
    finally:
        await front.stop()
        # The loop would go back to what Python does by default, in the middle of its own end.
        signals.hold_back()
        for number in signals.EXIT_CODES:
            loop.remove_signal_handler(number)
        signals.end_at_once()


async def _first(future: asyncio.Future[Any], stop_requested: asyncio.Event) -> bool:
    """True once `future` is done, false if the server is told to end before; then `future` is cancelled."""
    signalled = asyncio.ensure_future(stop_requested.wait())
    try:
        await asyncio.wait({future, signalled}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        signalled.cancel()
    if future.done():
        return True
    future.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await future
    return False


def _on_signal(stop_requested: asyncio.Event) -> None:
    if stop_requested.is_set():
        # The engine and its tuners end by themselves when our socket closes with us.
        os._exit(130)
    stop_requested.set()


def _greeting(model: ModelInfo, name: str, address: str) -> str:
    size = _short(model.parameter_count)
    quantised = "" if model.quantization == "none" else f", {model.quantization}"
    what = f"{size} parameters, {model.dtype} on {model.device}{quantised}"
    return f"graftwork: serving base '{name}' ({what}) on {address}"


def _short(count: int) -> str:
    """A count as people say it: 6.8M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _fail(message: str, code: int) -> int:
    print(f"graftwork: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
