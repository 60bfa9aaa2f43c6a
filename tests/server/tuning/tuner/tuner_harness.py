"""What tests of the tuner share: a real tuner process over a toy model, and the reading of its events."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tests import toys
from tests.server.tuning.rows_harness import copy_task, jsonl, make_tokenizer
from transformers import AutoModelForCausalLM

from graftwork_server.base.quantization import quantize_linears
from graftwork_server.base.weights import SharedWeights
from graftwork_server.tuner_main import serve
from graftwork_server.types import ModelInfo
from graftwork_server.wire.frames import encode_frame, receive_frame
from graftwork_server.wire.tuning import (
    Checkpointed,
    Failed,
    Finished,
    Progress,
    StartTuning,
    TunerEvent,
    TunerTask,
    tuner_decoder,
)


class TunerHarness:
    """The engine's side of tuner processes over one toy model, `model_dir`'s if there is one already."""

    def __init__(
        self, folder: Path, architecture: str = "llama", quantization: str = "none", model_dir: Path | None = None
    ) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        self.model_dir = model_dir or toys.make_model(architecture, folder / "model")
        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)
        parameter_count = sum(parameter.numel() for parameter in model.parameters())
        quantize_linears(model, quantization, torch.device("cpu"))
        self.model = model
        self.weights = SharedWeights(model, torch.device("cpu"), quantization)
        self.info = ModelInfo(
            fingerprint="sha256:toy",
            source="toy",
            architecture=type(model).__name__,
            model_type=model.config.model_type,
            dtype="float32",
            device="cpu",
            vocab_size=toys.VOCAB,
            context_tokens=128,
            parameter_count=parameter_count,
            weight_bytes=self.weights.size_bytes,
            eos_token_ids=[2],
            tokenizer_dir=str(self.tokenizer),
            kv_tokens=0,
            max_sequences=0,
            quantization=quantization,
        )
        self.gate = os.memfd_create("gate")
        os.ftruncate(self.gate, 8)

    def job(self, name: str, strategy: str = "lora", rows: int = 24, **settings: Any) -> TunerTask:
        """A job over `rows` rows of the copy task; other settings than TunerTask's are the strategy's."""
        data = self.folder / f"{name}.jsonl"
        data.write_bytes(b"".join(jsonl(copy_task(rows))))
        (self.folder / name).mkdir(exist_ok=True)
        spec = {key: settings.pop(key) for key in list(settings) if key in TunerTask.__struct_fields__}
        config = {"batch_size": 8, "learning_rate": 0.01, "max_steps": 12} | settings
        return TunerTask(
            **{
                "job_id": name,
                "strategy": strategy,
                "config": config,
                "dataset_path": str(data),
                "job_dir": str(self.folder / name),
                "artifact_dir": str(self.folder / name / "artifact"),
            }
            | spec
        )

    def start(self, job: TunerTask, yield_ms: int = 0) -> Tuner:
        """A tuner process at work on `job`."""
        mine, theirs = socket.socketpair()
        weights = self.weights.info()
        process = subprocess.Popen(
            [sys.executable, "-m", "graftwork_server.tuner_main", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno(), self.gate, weights.fd or 0],
        )
        theirs.close()
        mine.sendall(encode_frame(self.command(job, yield_ms)))
        return Tuner(process, mine)

    def command(self, job: TunerTask, yield_ms: int = 0) -> StartTuning:
        """What the engine sends first."""
        return StartTuning(
            job=job, model=self.info, weights=self.weights.info(), gate_fd=self.gate, threads=1, yield_ms=yield_ms
        )

    def run_here(self, job: TunerTask) -> list[TunerEvent]:
        """All events of a job, run in this process: starting one takes seconds."""
        events: list[TunerEvent] = []
        threads = torch.get_num_threads()
        serve(self.command(job), events.append)
        torch.set_num_threads(threads)
        return events

    def run(self, job: TunerTask) -> list[TunerEvent]:
        """All events of a job, to its end, run in a process of its own."""
        tuner = self.start(job)
        try:
            return tuner.events_until(Finished)
        finally:
            tuner.close()


class Tuner:
    """A running tuner process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        connection.settimeout(300)

    def events_until(self, kind: type) -> list[TunerEvent]:
        """Events up to the first of `kind`, or to a failure."""
        events: list[TunerEvent] = []
        while not events or not isinstance(events[-1], (kind, Failed)):
            events.append(tuner_decoder.decode(receive_frame(self.connection)))
        return events

    def kill(self) -> None:
        """SIGKILL, and nothing before it."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def close(self) -> None:
        """Closes the engine's end of the socket; the process must end by itself."""
        self.connection.close()
        self.process.wait(10)


def losses(events: Iterable[TunerEvent]) -> list[float]:
    """Training losses, in order."""
    return [event.progress.loss for event in events if isinstance(event, Progress)]


def checkpointed(events: Iterable[TunerEvent]) -> list[int]:
    """Steps with a checkpoint, in order."""
    return [event.step for event in events if isinstance(event, Checkpointed)]
