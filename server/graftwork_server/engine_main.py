"""Process entry of the engine worker: `python -m graftwork_server.engine_main --fd N --settings JSON`.

What takes seconds to import is imported once it is settled that this process ends with the front. Stands outside
engine/ because it brings engine and plugins together, and the engine itself imports no plugin manager.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork_server.config import DEMO_MODEL, ServerConfig
from graftwork_server.errors import FailedPrecondition, body_of
from graftwork_server.logs import set_up
from graftwork_server.process.last_words import exit_when_a_thread_dies
from graftwork_server.wire.engine import StartFailed
from graftwork_server.wire.frames import encode_frame

if TYPE_CHECKING:
    from graftwork_server.engine.worker import EngineWorker
    from graftwork_server.layers.models.base_model import BaseModel

log = logging.getLogger("graftwork.engine")

LEAST_KV_TOKENS = 128
"""A KV cache for less than a short prompt and its answer is a mistake in a setting."""


def main() -> int:
    """Loads the base model and serves until the front is gone. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="graftwork-engine")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--settings", required=True)
    arguments = parser.parse_args()
    settings = ServerConfig.model_validate_json(arguments.settings)
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


def _configure(settings: ServerConfig) -> None:
    set_up(settings.log_level, settings.log_format)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # transformers and its libraries draw progress bars and give advice that an operator of this server cannot follow.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _build(settings: ServerConfig, connection: socket.socket) -> EngineWorker:
    import torch

    from graftwork_server.base.describe import base_info
    from graftwork_server.base.device import choose_device, choose_dtype
    from graftwork_server.base.files import model_dir
    from graftwork_server.engine.worker import EngineWorker
    from graftwork_server.layers.models.load import load_model
    from graftwork_server.tuning.plugin_host import PluginHost

    threads = settings.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = settings.model or str(DEMO_MODEL)
    log.info("starting: reading %s, %s on %s, %d threads", source, str(dtype).removeprefix("torch."), device, threads)
    base = load_model(
        model_dir(source),
        device,
        dtype,
        Path(settings.data_dir) / "cache",
        settings.native_kernels != "off",
        settings.quantization,
    )
    log.info("starting: making room for the KV cache and for adapters")
    info = base_info(base.engine_model.model, base.info)
    worker = EngineWorker(base, info, settings, PluginHost(), connection, threads=threads)
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
