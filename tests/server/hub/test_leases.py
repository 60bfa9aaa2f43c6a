"""Claims and removals meet: nothing waits for a disk but what needs the same files."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.server.hub.hub_harness import publish

from graftwork_server.errors import NotFound
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.leases import Leases
from graftwork_server.hub.resolver import Resolved
from graftwork_server.types import AdapterRef


class SlowDisk:
    """A store whose removals, and a registry whose look-ups, wait until they may go on."""

    def __init__(self) -> None:
        self.published: set[str] = set()
        self.removed: list[str] = []
        self.removing = threading.Event()
        self.go_on = threading.Event()

    def remove_artifact(self, digest: str) -> None:
        self.removing.set()
        assert self.go_on.wait(60)
        self.removed.append(digest)

    def is_published(self, digest: str) -> bool:
        return digest in self.published

    def was_published(self, digest: str) -> bool:
        return False


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


@pytest.fixture
def leases(disk: SlowDisk) -> Leases:
    stand_in: Any = disk
    return Leases(stand_in, stand_in)


def resolved(digest: str) -> Resolved:
    return Resolved("mine", 1, AdapterRef(digest=digest, path=f"/{digest}", strategy="lora"))


async def test_a_removal_holds_up_nobody(leases: Leases, disk: SlowDisk) -> None:
    disk.published.add("b")
    removal = asyncio.create_task(asyncio.to_thread(leases.remove_if_unused, "a"))
    await asyncio.to_thread(disk.removing.wait)
    async with leases.hold(resolved("b")):
        assert leases.count == 1
    with pytest.raises(NotFound):
        async with leases.hold(resolved("a")):
            pass
    assert not removal.done()
    disk.go_on.set()
    assert await removal
    assert disk.removed[0] == "a"


async def test_what_is_published_again_waits_until_the_old_files_are_gone(leases: Leases, disk: SlowDisk) -> None:
    removal = asyncio.create_task(asyncio.to_thread(leases.remove_if_unused, "a"))
    await asyncio.to_thread(disk.removing.wait)
    claimed = threading.Event()

    def publish() -> None:
        with leases.claimed("a"):
            assert disk.removed == ["a"], "the folder is whole or not there"
            claimed.set()
            disk.published.add("a")

    publication = asyncio.create_task(asyncio.to_thread(publish))
    await asyncio.sleep(0.05)
    assert not claimed.is_set()
    disk.go_on.set()
    await asyncio.gather(removal, publication)
    assert claimed.is_set()
    assert disk.removed == ["a"]
    assert leases.count == 0


def test_what_is_claimed_or_published_stays(leases: Leases, disk: SlowDisk) -> None:
    disk.go_on.set()
    with leases.claimed("a"):
        assert not leases.remove_if_unused("a")
        assert disk.removed == []
    assert disk.removed == ["a"], "whoever ends the last claim removes it"
    disk.published.add("b")
    assert not leases.remove_if_unused("b")


async def test_a_version_deleted_after_it_was_resolved_is_not_leased(hub: Hub) -> None:
    publish(hub, "a")
    resolved = await hub.resolver.resolve("a")
    hub.delete_adapter("a")
    with pytest.raises(NotFound, match="deleted just now"):
        async with hub.leases.hold(resolved):
            pass
    assert not hub.leases.count


async def test_leased_files_stay_until_they_are_released(hub: Hub) -> None:
    version = publish(hub, "a")
    resolved = await hub.resolver.resolve("a")
    async with hub.leases.hold(resolved), hub.leases.hold(resolved):
        hub.delete_adapter("a")
        assert hub.store.has_artifact(version.digest)
    for _ in range(200):
        if not hub.store.has_artifact(version.digest):
            break
        await asyncio.sleep(0.01)
    assert not hub.store.has_artifact(version.digest)
    assert hub.leases.count == 0
    with pytest.raises(NotFound):
        async with hub.leases.hold(resolved):
            pass
    assert hub.leases.count == 0
