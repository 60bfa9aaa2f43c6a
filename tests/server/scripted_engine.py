"""An engine without a model: speaks the real protocol over the real socket and does what the prompt tells it.

A sequence yields its prompt's last token + 1, + 2, ... (below the vocabulary's size). The first prompt token may be one
of the commands below. `--settings` has under "model" a directory whose config.json has options: see OPTIONS.
Every message that arrives is written to options["log"], one JSON line each, so that tests can see a Cancel.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from array import array
from pathlib import Path

from graftwork_server.errors import ErrorBody, Violation
from graftwork_server.types import (
    ArtifactInfo,
    LoadReport,
    ModelInfo,
    SettingChoice,
    StrategyInfo,
    TuningEstimate,
    TuningProgress,
    TuningResult,
)
from graftwork_server.wire import engine as wire
from graftwork_server.wire import tuning
from graftwork_server.wire.frames import encode_frame, receive_frame

CRASH, HANG, FLOOD, FAIL, EOS, GARBAGE = 290, 291, 292, 293, 294, 295
"""Die with exit code 7; one token and no more; all tokens at once; an error; end of sequence after two tokens; send
a frame that is none."""
EOS_ID = 256

OPTIONS = {
    "log": None,
    "tokenizer_dir": None,
    "source": "scripted",
    "fingerprint": "sha256:" + "0" * 64,
    "context_tokens": 128,
    "vocab_size": 300,
    "step_ms": 1.0,
    "start_failed": None,
    "exit_on_start": None,
    "exit_after_ms": None,
    "labels": None,
    "problem_type": "single_label_classification",
    "generates": True,
    "default_pooling": "last",
    "undone_pooling": "",
    "job_steps": 3,
    "job_step_ms": 10.0,
}


class ScriptedEngine:
    """One connection to the front."""

    def __init__(self, sock: socket.socket, options: dict) -> None:
        self.sock, self.options = sock, options
        self.lock = threading.Lock()
        self.cancelled: set[int] = set()
        self.running = 0
        self.stopped_jobs: set[str] = set()
        self.loaded: dict[str, LoadReport] = {}

    def send(self, message) -> None:
        with self.lock:
            self.sock.sendall(encode_frame(message))

    def log(self, message) -> None:
        if self.options["log"]:
            with open(self.options["log"], "a") as file:
                entry = {"type": type(message).__name__, "id": getattr(message, "id", None)}
                if isinstance(message, wire.Generate):
                    entry |= {"prompt": message.prompt_ids, "adapter": message.adapter and message.adapter.digest}
                    entry["pool"] = message.pool and [message.pool.kind, message.pool.pooling, message.pool.normalize]
                    entry["types"] = message.pool and message.pool.token_type_ids
                    entry |= {"seed": message.sampling.seed, "max_tokens": message.sampling.max_tokens}
                if isinstance(message, wire.Pin):
                    entry["digests"] = message.digests
                if isinstance(message, wire.Unload):
                    entry["digest"] = message.digest
                file.write(json.dumps(entry) + "\n")

    def serve(self) -> None:
        while True:
            try:
                message = wire.front_decoder.decode(receive_frame(self.sock))
            except (EOFError, ConnectionError):
                return
            self.log(message)
            if isinstance(message, wire.Shutdown):
                end = time.monotonic() + message.drain_ms / 1000
                while self.running and time.monotonic() < end:
                    time.sleep(0.01)
                return
            if isinstance(message, wire.Cancel):
                self.cancelled.add(message.id)
            elif isinstance(message, wire.Generate):
                self.running += 1
                threading.Thread(target=self.generate, args=(message,), daemon=True).start()
            else:
                self.answer(message)

    def generate(self, message: wire.Generate) -> None:
        try:
            self.run_sequence(message)
        except OSError:
            pass
        finally:
            self.running -= 1

    def run_sequence(self, message: wire.Generate) -> None:
        command, count = message.prompt_ids[0], message.sampling.max_tokens
        if command == CRASH:
            os._exit(7)
        if command == GARBAGE:
            self.sock.sendall(b"\0\0\0\1\xc1")
            return
        if command == FAIL:
            body = ErrorBody(code="RESOURCE_EXHAUSTED", reason="KV_FULL", message="no room")
            self.output(message.id, [], "error", error=body)
            return
        if message.pool is not None:
            answer = self.pooled(message)
            self.output(message.id, [], "error" if "error" in answer else "stop", **answer)
            return
        if (alternatives := message.prompt_logprobs) is not None:
            scores = [wire.TokenLogprobs(message.prompt_ids[0], None)]
            scores += [wire.TokenLogprobs(t, -0.5, self.top(t, alternatives)) for t in message.prompt_ids[1:]]
            self.output(message.id, [], "length" if count == 0 else "", prompt_logprobs=scores)
            if count == 0:
                return
        for index in range(count):
            if message.id in self.cancelled:
                return
            token = (message.prompt_ids[-1] + 1 + index) % self.options["vocab_size"]
            finish = "length" if index == count - 1 else ""
            if command == EOS and index == 2:
                token, finish = EOS_ID, "stop"
            wanted = message.sampling.logprobs
            scores = None if wanted is None else [wire.TokenLogprobs(token, -0.25, self.top(token, wanted))]
            self.output(message.id, [token], finish, logprobs=scores)
            if finish:
                return
            if command == HANG:
                return
            if command != FLOOD:
                time.sleep(self.options["step_ms"] / 1000)

    def pooled(self, message: wire.Generate) -> dict:
        """Logits 1, 2, ... for as many labels as options["labels"] has; for a vector, the prompt's first tokens."""
        if message.pool.kind == "embed":
            values = [*map(float, message.prompt_ids), *[0.0] * 8][: message.pool.dimensions or 8]
            return {"pooled": wire.Pooled(array("f", values).tobytes())}
        if not self.options["labels"]:
            body = ErrorBody(code="FAILED_PRECONDITION", reason="HEAD_MISSING", message="there is no head")
            return {"error": body}
        values = [float(index + len(message.prompt_ids)) for index in range(len(self.options["labels"]))]
        head = wire.HeadInfo(self.options["labels"], self.options["problem_type"])
        return {"pooled": wire.Pooled(array("f", values).tobytes(), head if message.pool.names_head else None)}

    @staticmethod
    def top(token: int, count: int) -> list[tuple[int, float]]:
        return [(token, -0.25), *((other, -3.0) for other in range(1, count))][:count]

    def output(self, sequence: int, tokens: list[int], finish: str, **fields) -> None:
        self.send(wire.StepOutputs([wire.SequenceOutput(id=sequence, token_ids=tokens, finish=finish, **fields)]))

    def answer(self, message) -> None:
        try:
            result = getattr(self, f"on_{type(message).__name__.lower()}")(message)
            if isinstance(message, wire.Load | wire.Unload):
                self.send(wire.LoadedChanged(digests=sorted(self.loaded)))
            self.send(wire.Reply(call_id=message.call_id, result=result))
        except Refusal as refusal:
            self.send(wire.Reply(call_id=message.call_id, error=refusal.body))

    def on_load(self, message: wire.Load) -> wire.LoadReply:
        known = message.adapter.digest in self.loaded
        report = LoadReport(modules_bound=4, rank=8, device_bytes=1024, load_ms=1.5, already_loaded=known)
        self.loaded[message.adapter.digest] = report
        return wire.LoadReply(report=report)

    def on_unload(self, message: wire.Unload) -> wire.Unloaded:
        return wire.Unloaded(was_loaded=self.loaded.pop(message.digest, None) is not None)

    def on_pin(self, message: wire.Pin) -> wire.Pinned:
        return wire.Pinned()

    def on_inspect(self, message: wire.Inspect) -> wire.InspectReply:
        config = Path(message.path) / "adapter_config.json"
        if not config.exists():
            raise Refusal("FAILED_PRECONDITION", "ARTIFACT_UNKNOWN", "no strategy recognises these files")
        if "CRASH" in config.read_text():
            os._exit(7)
        if "REFUSE" in config.read_text():
            raise Refusal("FAILED_PRECONDITION", "UNKNOWN_TENSOR", "tensor 'x' binds nowhere")
        return wire.InspectReply(
            info=ArtifactInfo(strategy=message.strategy or "lora", parameter_count=64, rank=8, modules_bound=4)
        )

    def on_preparejob(self, message: tuning.PrepareJob) -> tuning.PreparedJob:
        if "typo" in message.config:
            raise Refusal("INVALID_ARGUMENT", "UNKNOWN_KEY", "there is no setting 'typo'", "spec.config.typo")
        if message.strategy not in ("lora", "full"):
            raise Refusal("NOT_FOUND", "STRATEGY_NOT_FOUND", f"there is no strategy {message.strategy!r}")
        estimate = TuningEstimate(trained_parameters=64, memory_bytes=4096, artifact_bytes=512, total_steps=3)
        choices = [
            SettingChoice(key="learning_rate", value=0.5, reason="set in the request", automatic=False),
            SettingChoice(key="rank", value=8, reason=f"{message.held_out_rows} rows are held out"),
            SettingChoice(key="names", value=["a"], reason="all there are"),
        ]
        config = {"rank": 8, "epochs": 1, **message.config}
        return tuning.PreparedJob(config=config, estimate=estimate, choices=choices)

    def on_startjob(self, message: tuning.StartJob) -> tuning.Started:
        threading.Thread(target=self.train, args=(message.job,), daemon=True).start()
        return tuning.Started(pid=os.getpid())

    def on_stopjob(self, message: tuning.StopJob) -> tuning.Stopped:
        self.stopped_jobs.add(message.job_id)
        return tuning.Stopped(was_running=True)

    def train(self, job: tuning.TunerTask) -> None:
        steps = self.options["job_steps"]
        for step in range(1, steps + 1):
            time.sleep(self.options["job_step_ms"] / 1000)
            if job.job_id in self.stopped_jobs:
                return
            progress = TuningProgress(
                step=step,
                total_steps=steps,
                loss=2.0 / step,
                learning_rate=1e-3,
                tokens_per_second=100.0,
                eta_ms=10 * (steps - step),
                seen_tokens=50 * step,
            )
            self.send(tuning.JobEvent(job_id=job.job_id, event=tuning.Progress(progress=progress)))
        self.send(tuning.JobEvent(job_id=job.job_id, event=tuning.Evaluated(step=steps, loss=0.75)))
        self.send(tuning.JobEvent(job_id=job.job_id, event=tuning.Checkpointed(step=steps)))
        self.send(tuning.JobEvent(job_id=job.job_id, event=tuning.Note(text="all well")))
        write_artifact(Path(job.artifact_dir), seed=job.job_id)
        result = TuningResult(
            trained_parameters=64,
            peak_memory_bytes=4096,
            artifact_bytes=512,
            train_ms=30,
            final_loss=0.7,
            validation_loss=0.75,
        )
        self.send(tuning.JobEvent(job_id=job.job_id, event=tuning.Finished(result=result)))


class Refusal(Exception):
    """An error answer."""

    def __init__(self, code: str, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        violations = [Violation(field, message)] if field else []
        self.body = ErrorBody(code=code, reason=reason, message=message, violations=violations)


def safetensors_bytes(seed: str = "") -> bytes:
    """A whole small safetensors file with one float32 tensor of 16 numbers, different for each seed."""
    header = {"weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "__metadata__": {"seed": seed}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def write_artifact(folder: Path, seed: str) -> None:
    """A finished artifact: written beside its place, then renamed."""
    beside = folder.with_name(folder.name + ".tmp")
    beside.mkdir(parents=True)
    (beside / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "seed": seed}))
    (beside / "adapter_model.safetensors").write_bytes(safetensors_bytes(seed))
    beside.rename(folder)


def model_info(options: dict) -> ModelInfo:
    return ModelInfo(
        fingerprint=options["fingerprint"],
        source=options["source"],
        architecture="ScriptedForCausalLM",
        model_type="scripted",
        dtype="float32",
        device="cpu",
        vocab_size=options["vocab_size"],
        context_tokens=options["context_tokens"],
        parameter_count=1234,
        weight_bytes=4936,
        eos_token_ids=[EOS_ID],
        tokenizer_dir=options["tokenizer_dir"],
        kv_tokens=4096,
        max_sequences=64,
        generates=options["generates"],
        hidden_size=8,
        default_pooling=options["default_pooling"],
        undone_pooling=options["undone_pooling"],
    )


STRATEGIES = [
    StrategyInfo(
        id="lora",
        version="1.0",
        api_version=1,
        distribution="graftwork 0.1.0",
        description="Low-rank adapters.",
        capabilities=["train", "serve"],
        config_json_schema='{"type": "object"}',
    ),
    StrategyInfo(id="full", version="1.0", api_version=1, distribution="graftwork 0.1.0", capabilities=["train"]),
    StrategyInfo(id="broken", distribution="graftwork-broken 0.1", load_error="ImportError: no module named 'x'"),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--settings", required=True)
    arguments = parser.parse_args()
    path = json.loads(arguments.settings).get("model")
    options = OPTIONS | {"source": path} | (json.loads((Path(path) / "config.json").read_text()) if path else {})
    if options["exit_on_start"] is not None:
        sys.exit(options["exit_on_start"])
    sock = socket.socket(fileno=arguments.fd)
    engine = ScriptedEngine(sock, options)
    if options["start_failed"]:
        body = ErrorBody(code="FAILED_PRECONDITION", reason="MODEL_MISSING", message=options["start_failed"])
        engine.send(wire.StartFailed(error=body))
        sys.exit(1)
    engine.send(wire.Hello(pid=os.getpid(), model=model_info(options), strategies=STRATEGIES))
    if options["exit_after_ms"] is not None:
        threading.Timer(options["exit_after_ms"] / 1000, os._exit, (9,)).start()
    engine.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
