"""What all jobs of a server share, and what of it each of them needs to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from graftwork_server.errors import FailedPrecondition, NotFound
from graftwork_server.hub.database.records import JobRecord
from graftwork_server.hub.hub import Hub
from graftwork_server.types import AdapterRef, ArtifactInfo, LoadReport, StrategyInfo
from graftwork_server.wire.tuning import PreparedJob, TunerTask


class EngineCalls(Protocol):
    """What jobs need of the engine; front/engine_client.py has it. All raise Unavailable while there is none."""

    @property
    def ready(self) -> bool:
        """Whether there is an engine now."""

    async def prepare_job(
        self, strategy: str, config: dict[str, Any], row_count: int, total_tokens: int, held_out_rows: int = 0
    ) -> PreparedJob:
        """Checks a job's settings, completes and estimates them. Raises InvalidArgument with the keys to change."""

    async def start_job(self, job: TunerTask) -> int:
        """Starts a tuner and gives its process id."""

    async def stop_job(self, job_id: str) -> bool:
        """Ends a tuner; true if it ran."""

    async def load(self, adapter: AdapterRef) -> LoadReport:
        """Loads an adapter beside the base."""

    async def inspect(self, path: str, strategy: str | None = None) -> ArtifactInfo:
        """Reads an artifact and checks it against the base without loading it."""


class EngineStatus:
    """Whether there is an engine, and how many were lost before it."""

    def __init__(self) -> None:
        self.ready = True
        self.lost = 0
        """How many were, which is the number of the present one."""


class JobContext(msgspec.Struct, frozen=True):
    """What all jobs share."""

    hub: Hub
    engine: EngineCalls
    status: EngineStatus
    base_fingerprint: str
    strategies: Callable[[], Sequence[StrategyInfo]]
    changed: Callable[[str], None]
    """Called with the job's id after each change that was written."""


def check_strategy(strategies: Sequence[StrategyInfo], strategy_id: str, field: str) -> None:
    """Raises NotFound (STRATEGY_NOT_FOUND) unless the strategy is there, and FailedPrecondition (STRATEGY_UNAVAILABLE)
    unless it can train."""
    strategy = next((strategy for strategy in strategies if strategy.id == strategy_id), None)
    able = [strategy.id for strategy in strategies if "train" in strategy.capabilities and not strategy.load_error]
    if strategy is None:
        raise NotFound(
            f"there is no strategy {strategy_id[:100]!r}; strategies that can train: {', '.join(able) or 'none'}",
            reason="STRATEGY_NOT_FOUND",
            field=field,
        )
    if strategy.load_error:
        problem = f"strategy {strategy_id!r} could not be loaded: {strategy.load_error}"
    elif "train" not in strategy.capabilities:
        problem = f"strategy {strategy_id!r} cannot train"
    else:
        return
    raise FailedPrecondition(
        f"{problem}; strategies that can train: {', '.join(able) or 'none'}", reason="STRATEGY_UNAVAILABLE", field=field
    )


def check_still_possible(job: JobRecord, context: JobContext) -> None:
    """A job that waited, perhaps over a restart, may have lost what it needs. Raises FailedPrecondition (BASE_MISMATCH,
    DATASET_NOT_FOUND, STRATEGY_UNAVAILABLE), NotFound (STRATEGY_NOT_FOUND)."""
    if job.base_fingerprint != context.base_fingerprint:
        raise FailedPrecondition(
            "the server hosts another base model now than when this job was created", reason="BASE_MISMATCH"
        )
    check_strategy(context.strategies(), job.spec.strategy, "spec.strategy")
    for dataset_id in filter(None, (job.spec.dataset_id, job.spec.validation_dataset_id)):
        if not context.hub.store.dataset_path(dataset_id).is_file():
            raise FailedPrecondition(f"data set {dataset_id} is gone", reason="DATASET_NOT_FOUND")
