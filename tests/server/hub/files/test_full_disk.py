"""A disk that is really full: a small file system of its own."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.hub.hub_harness import new, publish

from graftwork_server.errors import NotFound, ResourceExhausted
from graftwork_server.hub.database.records import StateChanged, TuningJobSpec
from graftwork_server.hub.hub import Hub
from graftwork_server.types import DatasetFormat, JobState, TuningEstimate

DISK_BYTES = 16 << 20
ESTIMATE = TuningEstimate(trained_parameters=1, memory_bytes=1, artifact_bytes=1, total_steps=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 16 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root may mount a small file system: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all room that is left, to the last byte."""
    path = disk / "full"
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return path


def job(hub: Hub, adapter_id: str) -> str:
    job_id = f"job-{adapter_id}"
    hub.jobs.create(
        job_id, TuningJobSpec(strategy="lora", dataset_id="d", adapter_id=adapter_id), ESTIMATE, "base", None
    )
    return job_id


def full_hub(disk: Path) -> Hub:
    """A hub on a disk that has become full, its write-ahead log included: nothing more can be published."""
    hub = Hub(disk / "data")
    for n in range(20):
        publish(hub, f"a{n}", f"[{n}]")
    hub.registry.set_pinned(hub.registry.get_version("a3"), True)
    hub.datasets.add("d", display_name="", format=DatasetFormat.TEXT, row_count=1, size_bytes=0)
    job(hub, "waiting")
    fill(disk)
    with pytest.raises(ResourceExhausted) as caught:  # noqa: PT012 - the log has some room left, nobody knows how much
        for n in range(1000):
            hub.registry.add_version(new(f"b{n}", f"sha256:{n:064}"), adapter_may_exist=False)
    assert caught.value.reason == "STORAGE_FULL"
    fill(disk)
    return hub


def test_deleting_works_on_a_full_disk(disk: Path) -> None:
    hub = full_hub(disk)
    for n in range(20):
        hub.delete_adapter(f"a{n}")
        fill(disk)  # others take what was freed
        with pytest.raises(NotFound):
            hub.registry.get_version(f"a{n}")
    hub.close()


def test_unpinning_and_cancelling_work_on_a_full_disk(disk: Path) -> None:
    hub = full_hub(disk)
    assert not hub.registry.set_pinned(hub.registry.get_version("a3"), False).pinned
    assert hub.jobs.record("job-waiting", [StateChanged(state=JobState.CANCELLED)]).state is JobState.CANCELLED
    hub.close()


def test_a_server_starts_on_a_full_disk_and_deletes(disk: Path) -> None:
    full_hub(disk).close()
    fill(disk)
    hub = Hub(disk / "data")
    assert hub.delete_adapter("a7")
    hub.close()


def test_the_reserve_is_taken_again_and_the_log_is_cut(disk: Path) -> None:
    hub = full_hub(disk)
    reserve = disk / "data" / "reserve"
    before = reserve.stat().st_size
    assert before >= 1 << 20
    hub.delete_adapter("a1")
    (disk / "full").unlink()
    hub.delete_adapter("a2")
    assert reserve.stat().st_blocks * 512 >= 1 << 20
    assert (disk / "data" / "registry.db-wal").stat().st_size == 0
    publish(hub, "again")
    hub.close()
