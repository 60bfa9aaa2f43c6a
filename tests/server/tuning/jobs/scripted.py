"""An engine that does what a test tells it to, and a server's jobs around it. Run as a program, it is a server to kill.

python scripted.py DATA_DIR     starts the jobs that are there, or creates one; ends when none is left
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from graftwork_server.errors import GraftworkServerError, InvalidArgument, Unavailable
from graftwork_server.hub.database.records import JobRecord, TuningJobSpec
from graftwork_server.hub.files.uploads import DatasetUpload
from graftwork_server.hub.hub import Hub
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.jobs.manager import JobManager
from graftwork_server.types import (
    AdapterRef,
    ArtifactInfo,
    DatasetFormat,
    LoadReport,
    ModelInfo,
    SettingChoice,
    StrategyInfo,
    TuningEstimate,
    TuningProgress,
    TuningResult,
)
from graftwork_server.wire.tuning import (
    Checkpointed,
    Evaluated,
    Finished,
    JobEvent,
    PreparedJob,
    Progress,
    TunerEvent,
    TunerTask,
)

ROWS = [{"prompt": f"say {n}", "completion": str(n)} for n in range(10)]
MODEL = ModelInfo(
    fingerprint="sha256:base", source="toy", architecture="Toy", model_type="toy", dtype="float32", device="cpu",
    vocab_size=300, context_tokens=64, parameter_count=1, weight_bytes=4, eos_token_ids=[256], tokenizer_dir=None,
    kv_tokens=64, max_sequences=1,
)  # fmt: skip
ESTIMATE = TuningEstimate(trained_parameters=5, memory_bytes=6, artifact_bytes=7, total_steps=3)
RESULT = TuningResult(
    trained_parameters=5, peak_memory_bytes=6, artifact_bytes=7, train_ms=8, final_loss=0.5, validation_loss=0.6
)
STRATEGIES = [
    StrategyInfo(id="lora", capabilities=["train", "serve"]),
    StrategyInfo(id="fixed", capabilities=["serve"]),
    StrategyInfo(id="broken", load_error="ImportError: no"),
]
Say = Callable[[TunerEvent], None]
Script = Callable[[TunerTask, Say], Awaitable[None]]


def text_processor() -> TextProcessor:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: id for id, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextProcessor(tokenizer, {"eos_token": "</s>"}, None)


def step(number: int, loss: float = 1.0) -> Progress:
    return Progress(
        progress=TuningProgress(
            step=number, total_steps=3, loss=loss, learning_rate=1e-4, tokens_per_second=9, eta_ms=1, seen_tokens=number
        )
    )


def leave_artifact(job: TunerTask, header: bytes = b"{}") -> None:
    """What a tuner does at its end."""
    folder = Path(job.artifact_dir)
    temporary = folder.with_name("artifact.tmp")
    temporary.mkdir()
    (temporary / "adapter_config.json").write_text(json.dumps(job.config))
    (temporary / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    temporary.rename(folder)


async def train(job: TunerTask, say: Say) -> None:
    """A tuner without surprises."""
    for number in (1, 2, 3):
        say(step(number))
    say(Checkpointed(step=3))
    say(Evaluated(step=3, loss=0.6))
    leave_artifact(job)
    say(Finished(result=RESULT))


async def never(job: TunerTask, say: Say) -> None:
    """A tuner that takes one step, and its time."""
    say(step(1))


class ScriptedEngine:
    """EngineCalls by script; remembers what it was asked."""

    def __init__(self, script: Script = train) -> None:
        self.script = script
        self.manager: JobManager | None = None
        self.alive = True
        self.prepared: list[tuple[int, int]] = []
        self.held_out: list[int] = []
        self.started: list[TunerTask] = []
        self.stopped: list[str] = []
        self.loaded: list[str] = []
        self.load_error: GraftworkServerError | None = None

    @property
    def ready(self) -> bool:
        return self.alive

    def _check(self) -> None:
        if not self.alive:
            raise Unavailable("the engine is restarting", reason="ENGINE_RESTARTING")

    def die(self) -> None:
        assert self.manager is not None
        self.alive = False
        self.manager.on_engine_lost()

    def return_(self) -> None:
        assert self.manager is not None
        self.alive = True
        self.manager.on_engine_ready()

    async def prepare_job(
        self, strategy: str, config: dict[str, Any], row_count: int, total_tokens: int, held_out_rows: int = 0
    ) -> PreparedJob:
        self._check()
        if "bad" in config:
            raise InvalidArgument("unknown setting 'bad'", reason="CONFIG_INVALID", field="spec.config.bad")
        self.prepared.append((row_count, total_tokens))
        self.held_out.append(held_out_rows)
        chosen = SettingChoice(key="rank", value=8, reason="as good as any")
        return PreparedJob(config={"rank": 8, **config}, estimate=ESTIMATE, choices=[chosen])

    async def start_job(self, job: TunerTask) -> int:
        self._check()
        self.started.append(job)
        manager = self.manager
        assert manager is not None
        await self.script(job, lambda event: manager.on_job_event(JobEvent(job_id=job.job_id, event=event)))
        self._check()
        return 1

    async def stop_job(self, job_id: str) -> bool:
        self._check()
        self.stopped.append(job_id)
        return True

    async def load(self, adapter: AdapterRef) -> LoadReport:
        self._check()
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append(adapter.digest)
        return LoadReport(modules_bound=1, rank=1, device_bytes=1, load_ms=1)

    async def inspect(self, path: str, strategy: str | None = None) -> ArtifactInfo:
        self._check()
        return ArtifactInfo(strategy=strategy or "lora", parameter_count=5, rank=8, modules_bound=1)


def add_dataset(hub: Hub, rows: list[dict[str, Any]]) -> str:
    with DatasetUpload(hub.store, 1 << 20) as upload:
        upload.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        dataset_id = upload.finish()
        upload.store()
    hub.datasets.add(
        dataset_id,
        display_name="rows.jsonl",
        format=DatasetFormat.PROMPT_COMPLETION,
        row_count=len(rows),
        size_bytes=upload.size_bytes,
    )
    return dataset_id


@asynccontextmanager
async def server(data_dir: Path, engine: ScriptedEngine, **options: Any) -> Any:
    """Hub and jobs, started; stopped at the end as a server does."""
    hub = Hub(data_dir)
    options = {"model": MODEL, "strategies": lambda: STRATEGIES, "text": text_processor()} | options
    manager = JobManager(hub, engine, **options)
    engine.manager = manager
    try:
        await manager.start()
        yield hub, manager
    finally:
        await manager.stop()
        hub.close()


async def ended(manager: JobManager, job_id: str) -> JobRecord:
    """The job, once it has ended."""
    async for _ in manager.watch(job_id):
        pass
    return await manager.get(job_id)


async def _main(data_dir: Path) -> None:
    async with server(data_dir, ScriptedEngine()) as (hub, manager):
        if not hub.jobs.unfinished():
            dataset_id = add_dataset(hub, ROWS)
            await manager.create(TuningJobSpec(strategy="lora", dataset_id=dataset_id, adapter_id="a", load=True), "r1")
        for job in hub.jobs.unfinished():
            await ended(manager, job.job_id)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
