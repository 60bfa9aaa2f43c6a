"""The tuner process: `python -m graftwork_server.tuner_main --fd N`, one for each running job.

It gets StartTuning over the inherited socket N, maps the base weights, trains, and says how it goes. It ends with its
job, and at once when the engine is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import socket
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from graftwork_plugins import BaseModelHandle, Strategy, TrainingConfig, TrainingRow
from graftwork_server.durable import FULL, write_json
from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument, body_of
from graftwork_server.logs import set_up
from graftwork_server.process.last_words import exit_when_a_thread_dies
from graftwork_server.process.priority import step_back
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import how_to_fit, no_end, read_lines, tokenize_rows
from graftwork_server.tuning.data.rows import learned_ends, loss_tokens
from graftwork_server.tuning.plugin_host import PluginHost, guard, is_out_of_memory, parse_config
from graftwork_server.tuning.schedule import split_rows
from graftwork_server.tuning.tuner.artifact import write_artifact
from graftwork_server.tuning.tuner.memory import peak_memory
from graftwork_server.types import TuningResult
from graftwork_server.wire.frames import encode_frame, receive_frame
from graftwork_server.wire.tuning import Failed, Finished, Note, StartTuning, TunerEvent, command_decoder

if TYPE_CHECKING:
    from graftwork_server.tuning.tuner.loop import Run

RESULT_FILE = "result.json"
"""In job_dir, beside a whole artifact: a tuner that is started again need not train again."""

_NICENESS = 10
_OOM_SCORE = 500

log = logging.getLogger("graftwork.tuner")


def main() -> None:
    """Serves one StartTuning, then ends."""
    # Advice of one library to the other, which an operator of this server cannot follow.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    set_up("info", "text")
    exit_when_a_thread_dies()
    command = command_decoder.decode(receive_frame(connection))
    threading.Thread(target=_exit_with_engine, args=(connection,), name="watchdog", daemon=True).start()
    step_back(_NICENESS, _OOM_SCORE)

    def send(event: TunerEvent) -> None:
        connection.sendall(encode_frame(event))

    serve(command, send)


def serve(command: StartTuning, send: Callable[[TunerEvent], None]) -> None:
    """Runs one job; the last event sent is Finished or Failed."""
    try:
        send(Finished(result=_run_job(command, send)))
    except Exception as error:
        explained = _explained(error)
        expected = isinstance(explained, GraftworkServerError)  # no defect, so no traceback
        log.error("the job %s ended: %s", command.job.job_id, explained, exc_info=None if expected else error)
        send(Failed(error=body_of(explained)))


def _run_job(command: StartTuning, send: Callable[[TunerEvent], None]) -> TuningResult:
    """Trains one job and writes its artifact. Raises GraftworkServerError, or what went wrong otherwise."""
    job = command.job
    artifact_dir, result_file = Path(job.artifact_dir), Path(job.job_dir) / RESULT_FILE
    if artifact_dir.is_dir() and result_file.is_file():
        send(Note(text="the job had ended before; its artifact is whole"))
        return msgspec.json.decode(result_file.read_bytes(), type=TuningResult)
    strategy = PluginHost().strategy(job.strategy)
    config = parse_config(strategy, job.config)
    rows, ends = _read_rows(command, config, send)
    # torch comes only now: importing it takes seconds, and what is wrong with a job is known before.
    from graftwork_server.tuning.tuner.loop import train

    run = _prepared(command, strategy, config, rows, send)
    for text in run.trainable.notes:
        send(Note(text=text))
    state = train(run)
    with guard(run.strategy.id, "save"):
        saved = run.strategy.save(run.trainable)
    artifact_bytes = write_artifact(saved, artifact_dir)
    result = TuningResult(
        trained_parameters=sum(parameter.numel() for parameter in run.trainable.parameters.values()),
        peak_memory_bytes=peak_memory(command.model.device.partition(":")[0]),
        artifact_bytes=artifact_bytes,
        train_ms=state.train_ms,
        final_loss=sum(state.recent_losses) / len(state.recent_losses),
        validation_loss=state.validation_loss,
        published_step=state.published_step,
        end_token_ids=ends,
    )
    write_json(result_file, msgspec.to_builtins(result))
    return result


def _prepared(
    command: StartTuning,
    strategy: Strategy,
    config: TrainingConfig,
    rows: tuple[list[TrainingRow], list[TrainingRow]],
    send: Callable[[TunerEvent], None],
) -> Run:
    """Everything up to the first step: the base model, and what the strategy builds on it."""
    import torch

    from graftwork_server.base.describe import base_info
    from graftwork_server.base.quantization import bitsandbytes
    from graftwork_server.base.weights import map_base_model
    from graftwork_server.tuning.tuner.checkpoint import Checkpoints
    from graftwork_server.tuning.tuner.gate import Gate
    from graftwork_server.tuning.tuner.loop import Run
    from graftwork_server.tuning.tuner.reports import Reports

    job, model = command.job, command.model
    torch.set_num_threads(command.threads)
    if importlib.util.find_spec("bitsandbytes") is not None:
        bitsandbytes()  # PEFT would import it, with what base/quantization.py keeps it from doing
    base_model = map_base_model(command.weights)
    base = BaseModelHandle(base_info(base_model, model), base_model, torch.device(model.device))
    torch.manual_seed(config.seed)
    with guard(strategy.id, "build"):
        trainable = strategy.build(base, config)
    identity = {"base": model.fingerprint, "strategy": f"{strategy.id} {strategy.version}"}
    return Run(
        strategy=strategy,
        config=config,
        trainable=trainable,
        device=base.device,
        rows=rows[0],
        held_out=rows[1],
        checkpoints=Checkpoints(Path(job.job_dir) / "checkpoints", identity),
        reports=Reports(Path(job.job_dir) / "reports", send, job.reported_step),
        gate=Gate(command.gate_fd, command.yield_ms),
    )


def _read_rows(
    command: StartTuning, config: TrainingConfig, send: Callable[[TunerEvent], None]
) -> tuple[tuple[list[TrainingRow], list[TrainingRow]], list[int]]:
    """Rows to train on and rows held out, tokenised, and the tokens that end those; rows without loss are left out."""
    model, job = command.model, command.job
    if model.tokenizer_dir is None:
        raise FailedPrecondition(
            "the base model has no tokenizer, so text cannot be trained on", reason="TOKENIZER_MISSING"
        )
    text = TextProcessor.from_dir(model.tokenizer_dir)
    longest = min(config.max_sequence_tokens or model.context_tokens, model.context_tokens)
    rows = list(_tokenized(Path(job.dataset_path), text, longest))
    if job.validation_path is not None:
        held_out = list(_tokenized(Path(job.validation_path), text, longest))
    else:
        chosen, kept_out = split_rows(len(rows), job.validation_fraction, config.seed)
        rows, held_out = [rows[index] for index in chosen], [rows[index] for index in kept_out]
    learnable = [row for row in rows if loss_tokens(row)]
    if not learnable:
        raise InvalidArgument(
            f"no row carries loss within {longest} tokens; {how_to_fit(longest, model.context_tokens)}",
            reason="DATASET_NO_LOSS",
        )
    if len(learnable) < len(rows):
        send(Note(text=f"{len(rows) - len(learnable)} rows carry no loss within {longest} tokens and are left out"))
    ends = sorted(frozenset[int]().union(*(learned_ends(row, text) for row in learnable)))
    if not ends:
        send(Note(text=no_end(text)))
    return (learnable, [row for row in held_out if loss_tokens(row)]), ends


def _tokenized(path: Path, text: TextProcessor, longest: int) -> Iterator[TrainingRow]:
    with path.open("rb") as file:
        for row in tokenize_rows(read_lines(file), text, longest):
            # Four bytes a token instead of the 36 that a list of ints takes.
            yield TrainingRow(array("i", row.input_ids), array("i", row.labels))


def _explained(error: Exception) -> Exception:
    """Running out of memory or of disk as what the client can do about it."""
    if is_out_of_memory(error):
        return FailedPrecondition(
            "memory ran out; set micro_batch_tokens lower (and max_sequence_tokens, if single rows are long)",
            reason="OUT_OF_MEMORY",
        )
    # safetensors has its own exception and says the number in the text.
    if any(getattr(error, "errno", None) == full or f"(os error {full})" in str(error) for full in FULL):
        return FailedPrecondition("the disk is full", reason="DISK_FULL")
    return error


def _exit_with_engine(connection: socket.socket) -> None:
    """Ends this process, whatever it is doing, when the engine's end of the socket closes."""
    with contextlib.suppress(OSError):
        while connection.recv(1):
            pass
    os._exit(1)


if __name__ == "__main__":
    main()
