"""publishing.py: what is published is numbered, whole and there after a restart."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.server.hub.hub_harness import publish

from graftwork_server.errors import AlreadyExists, NotFound
from graftwork_server.hub.hub import Hub


def test_a_refused_publication_leaves_no_files(hub: Hub) -> None:
    publish(hub, "a", "[1]")
    with pytest.raises(AlreadyExists):
        publish(hub, "a", "[2]", adapter_may_exist=False)
    assert len(list(hub.store.artifacts.iterdir())) == 1


def test_concurrent_publications_get_their_own_numbers(hub: Hub) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: publish(hub, "a", f"[{n}]").number, range(24)))
    assert sorted(numbers) == list(range(1, 25))


def test_what_was_published_is_there_after_a_restart(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    version = publish(hub, "a")
    hub.close()
    hub = Hub(tmp_path)
    assert hub.registry.get_version("a") == version
    assert hub.store.has_artifact(version.digest)
    hub.close()


async def test_equal_content_is_kept_for_the_other_name(hub: Hub) -> None:
    version = publish(hub, "a")
    assert publish(hub, "b").digest == version.digest
    hub.delete_adapter("a")
    assert hub.store.has_artifact(version.digest)
    hub.delete_adapter("b")
    assert not hub.store.has_artifact(version.digest)


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    first = publish(hub, "a", "[1]")
    assert [version.number for version in hub.delete_adapter("a")] == [1]
    again = publish(hub, "a", "[2]")
    assert (again.number, again.follows, again.digest == first.digest) == (2, 0, False)
    publish(hub, "a", "[3]")
    hub.delete_adapter("a")
    hub.close()
    hub = Hub(tmp_path)
    assert [publish(hub, "a", f"[{n}]").number for n in (1, 4)] == [4, 5]
    assert publish(hub, "b").number == 1
    with pytest.raises(NotFound):
        hub.registry.get_version("a", 1)
    hub.close()


def test_a_version_says_which_one_it_follows(hub: Hub) -> None:
    assert [publish(hub, "a", f"[{n}]").follows for n in range(3)] == [0, 1, 2]
    assert hub.registry.get_version("a", 2).follows == 1


def test_the_same_files_again_are_the_same_version(hub: Hub) -> None:
    first, second = publish(hub, "a", "[1]"), publish(hub, "a", "[2]")
    assert publish(hub, "a", "[2]") == second
    assert hub.registry.get_version("a") == second
    # Going back to what was served earlier changes what the name serves: that has a number of its own.
    back = publish(hub, "a", "[1]")
    assert (back.number, back.follows, back.digest) == (3, 2, first.digest)
    with pytest.raises(AlreadyExists):
        publish(hub, "a", "[1]", adapter_may_exist=False)
    assert [version.number for version in hub.registry.list_versions("a")[0]] == [3, 2, 1]


def test_publishing_races_with_deleting_equal_content(hub: Hub) -> None:
    """Whoever wins: a version that is there has its files."""
    stop = threading.Event()

    def churn(name: str) -> None:
        while not stop.is_set():
            version = publish(hub, name)
            assert hub.store.has_artifact(version.digest)
            hub.delete_adapter(name)

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(churn, name) for name in ("a", "b", "c")]
        threading.Timer(1.0, stop.set).start()
        for future in futures:
            future.result()
    assert list(hub.store.artifacts.iterdir()) == []
