"""Process entry of the engine worker: `python -m graftwork_server.engine_main --fd N --settings JSON`.

What takes seconds to import is imported once it is settled that this process ends with the front. Stands outside
engine/ because it brings engine and plugins together, and the engine itself imports no plugin manager.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import select
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork_server.errors import FailedPrecondition, body_of
from graftwork_server.logs import set_up
from graftwork_server.process.last_words import exit_when_a_thread_dies
from graftwork_server.wire.engine import StartFailed
from graftwork_server.wire.frames import encode_frame

if TYPE_CHECKING:
    from graftwork_server.engine.worker import EngineWorker
    from graftwork_server.layers.base_model import BaseModel

log = logging.getLogger("graftwork.engine")

LEAST_KV_TOKENS = 128
"""A KV cache for less than a short prompt and its answer is a mistake in a setting."""


def main() -> int:
    """Loads the base model and serves until the front is gone. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="graftwork-engine")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--settings", required=True)
    arguments = parser.parse_args()
    settings: dict[str, Any] = json.loads(arguments.settings)
    exit_when_a_thread_dies()
    connection = socket.socket(fileno=arguments.fd)
    started = threading.Event()
    threading.Thread(target=_end_with_front, args=(connection, started), name="front", daemon=True).start()
    try:
        _configure(settings)
        worker = _build(settings, connection)
    except Exception as error:
        log.debug("the engine did not start", exc_info=True)
        with contextlib.suppress(OSError):  # nobody is left to be told
            connection.sendall(encode_frame(StartFailed(error=body_of(error))))
        return 1
    # What is there now stays: the garbage collector need not look at it again in the middle of a step.
    gc.collect()
    gc.freeze()
    started.set()
    worker.run()
    # Loader threads may be inside a plugin; waiting for them would keep the process alive for nobody.
    sys.stderr.flush()
    os._exit(0)


def _end_with_front(connection: socket.socket, started: threading.Event) -> None:
    """Ends this process if the front goes while it starts. Afterwards the worker does, which has streams to end."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    while not started.is_set():
        if poll.poll(100):
            os._exit(1)


def _configure(settings: dict[str, Any]) -> None:
    set_up(str(settings.get("log_level", "info")), str(settings.get("log_format", "text")))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # transformers and its libraries draw progress bars and give advice that an operator of this server cannot follow.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _build(settings: dict[str, Any], connection: socket.socket) -> EngineWorker:
    import torch

    from graftwork_server.base.describe import base_info
    from graftwork_server.base.device import choose_device, choose_dtype
    from graftwork_server.base.files import model_dir
    from graftwork_server.engine.engine import EngineLimits
    from graftwork_server.engine.models.load import load_model
    from graftwork_server.engine.outbox import default_messages_per_second
    from graftwork_server.engine.worker import EngineWorker
    from graftwork_server.tuning.plugin_host import PluginHost

    threads = int(settings.get("threads") or 0) or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device = choose_device(str(settings.get("device", "auto")))
    dtype = choose_dtype(str(settings.get("dtype", "auto")), device)
    source = settings.get("model") or str(Path(__file__).parent / "demo_model")
    log.info("starting: reading %s, %s on %s, %d threads", source, str(dtype).removeprefix("torch."), device, threads)
    base = load_model(
        model_dir(str(source)),
        device,
        dtype,
        Path(settings["cache_dir"]),
        settings.get("native_kernels") != "off",
        str(settings.get("quantization", "none")),
    )
    limits = EngineLimits(
        max_sequences=int(settings.get("max_sequences", 64)),
        max_step_tokens=int(settings.get("max_step_tokens", 1024)),
        kv_memory_bytes=int(settings.get("kv_memory_bytes", 0)),
        adapter_memory_bytes=int(settings.get("adapter_memory_bytes", 0)),
        prefix_cache=bool(settings.get("prefix_cache", True)),
        host_cache_bytes=int(settings.get("host_cache_bytes", 0)),
        cuda_graphs=settings.get("cuda_graphs") != "off",
    )
    log.info("starting: making room for the KV cache and for adapters")
    worker = EngineWorker(
        base,
        base_info(base.engine_model.model, base.info),
        limits,
        PluginHost(),
        connection,
        threads=threads,
        tuning_yield_ms=int(settings.get("tuning_yield_ms", 100)),
        messages_per_second=int(settings.get("messages_per_second") or 0) or default_messages_per_second(),
    )
    if base.info.generates:
        check_kv_cache(base, worker.engine.kv_tokens)
    return worker


def check_kv_cache(base: BaseModel, kv_tokens: int) -> None:
    """Says so where the KV cache holds less than one whole context, which then is the longest sequence.

    Raises FailedPrecondition (KV_MEMORY_TOO_SMALL) where it holds no useful sequence.
    """
    context = base.info.context_tokens
    if kv_tokens >= context:
        return
    bytes_per_token = sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    holds = (
        f"the KV cache holds {kv_tokens} tokens, less than the model's context of {context}, which takes "
        f"{context * bytes_per_token} bytes"
    )
    least = min(LEAST_KV_TOKENS, context)
    if kv_tokens < least:
        raise FailedPrecondition(
            f"--kv-memory-bytes: {holds}; at least {least} tokens are accepted: {least * bytes_per_token} bytes, or 0 "
            "for the engine's choice",
            reason="KV_MEMORY_TOO_SMALL",
        )
    log.warning("%s: longer sequences are refused; --kv-memory-bytes sets its size", holds)


if __name__ == "__main__":
    sys.exit(main())
