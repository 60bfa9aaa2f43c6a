"""registry.py, resolver.py, leases.py and the schema, on a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from graftwork_server.errors import AlreadyExists, FailedPrecondition, GraftworkServerError, InvalidArgument, NotFound
from graftwork_server.hub.database.pages import page_token
from graftwork_server.hub.database.records import NewVersion, VersionRecord
from graftwork_server.hub.database.tables import Base
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.registry import request_key
from graftwork_server.hub.resolver import Resolved
from graftwork_server.types import ArtifactInfo, DatasetFormat

INFO = ArtifactInfo(strategy="lora", parameter_count=10, rank=4, modules_bound=2)
HOSTILE_IDS = [
    "", ".", "..", "../x", "a/b", "/a", "a\\b", "a\n", "a\0b", "ü", "\u202ea", "a b", "-a", "_a", ".a", "a" * 65, "a@0",
    "a@", "a@x", "a@-1", "a@1@2", "a@01", "a@1\n", "a@" + "9" * 30, "a@²", "@1", "a%2e", "~", "$(x)", "a;b", "a'b", "*",
]  # fmt: skip


def new(adapter_id: str, digest: str = "sha256:" + "0" * 64) -> NewVersion:
    return NewVersion(
        adapter_id=adapter_id,
        digest=digest,
        strategy="lora",
        base_fingerprint="base",
        size_bytes=1,
        parameter_count=1,
        rank=1,
    )


def publish(hub: Hub, adapter_id: str, content: str = "{}", adapter_may_exist: bool = True) -> VersionRecord:
    folder = hub.store.new_staging()
    (folder / "adapter_config.json").write_text(content)
    return hub.publish(
        folder, adapter_id=adapter_id, info=INFO, base_fingerprint="base", adapter_may_exist=adapter_may_exist
    )


# ------------------------------------------------------------------------------------------- versions


def test_versions_count_up_and_the_newest_answers(hub: Hub) -> None:
    assert [publish(hub, "a", f"[{n}]").number for n in range(3)] == [1, 2, 3]
    assert hub.registry.get_version("a").number == 3
    assert hub.registry.get_version("a", 2).name == "adapters/a/versions/2"
    with pytest.raises(AlreadyExists) as exists:
        publish(hub, "a", adapter_may_exist=False)
    assert exists.value.reason == "ADAPTER_EXISTS"
    with pytest.raises(NotFound) as missing:
        hub.registry.get_version("a", 4)
    assert missing.value.reason == "VERSION_NOT_FOUND"


def test_what_is_remembered_is_what_the_database_says(hub: Hub) -> None:
    registry = hub.registry
    assert registry.recent_version("a") is None
    first = publish(hub, "a", "[1]")
    assert registry.recent_version("a") is None, "only what was read is remembered"
    assert registry.get_version("a") == registry.recent_version("a") == first
    assert registry.was_published(first.digest)
    second = publish(hub, "a", "[2]")
    assert registry.recent_version("a") is None
    assert registry.get_version("a") == registry.recent_version("a") == second
    assert registry.get_version("a", 1) == registry.recent_version("a", 1) == first
    registry.set_pinned(second, True)
    assert registry.recent_version("a") is None
    assert registry.get_version("a").pinned
    hub.delete_adapter("a")
    assert registry.recent_version("a") is None
    assert not registry.was_published(second.digest)
    with pytest.raises(NotFound):
        registry.get_version("a")


async def test_a_version_deleted_after_it_was_resolved_is_not_leased(hub: Hub) -> None:
    publish(hub, "a")
    resolved = await hub.resolver.resolve("a")
    hub.delete_adapter("a")
    with pytest.raises(NotFound, match="deleted just now"):
        async with hub.leases.hold(resolved):
            pass
    assert not hub.leases.count


def test_a_refused_publication_leaves_no_files(hub: Hub) -> None:
    publish(hub, "a", "[1]")
    with pytest.raises(AlreadyExists):
        publish(hub, "a", "[2]", adapter_may_exist=False)
    assert len(list(hub.store.artifacts.iterdir())) == 1


def test_unknown_adapters_get_a_hint(hub: Hub) -> None:
    for adapter_id in ("dates-v1", "dates-v2", "dates-v3", "dates-v4", "other"):
        hub.registry.add_version(new(adapter_id), adapter_may_exist=False)
    with pytest.raises(NotFound) as caught:
        hub.registry.get_version("dates-v")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"
    assert caught.value.message.count("dates-v") == 4
    assert "other" not in caught.value.message


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


# ------------------------------------------------------------------------------------------- requests


def test_a_repeated_request_gets_the_first_answer(hub: Hub) -> None:
    key = request_key("CreateAdapter", "r1", {"adapter_id": "a"})
    first = hub.registry.add_version(new("a"), adapter_may_exist=False, request=key)
    assert hub.registry.add_version(new("a"), adapter_may_exist=False, request=key) == first
    assert hub.registry.find_request(key) == first
    assert hub.registry.find_request(request_key("CreateAdapter", "r2", {})) is None
    with pytest.raises(InvalidArgument) as caught:
        hub.registry.find_request(request_key("CreateAdapter", "r1", {"adapter_id": "b"}))
    assert caught.value.reason == "REQUEST_ID_REUSED"
    hub.delete_adapter("a")
    with pytest.raises(NotFound):
        hub.registry.find_request(key)


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "é", "a\n"])
def test_request_ids_are_short_and_plain(request_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        request_key("CreateAdapter", request_id, {})
    assert caught.value.violations[0].field == "request_id"
    assert request_key("CreateAdapter", "", {}) is None


# ------------------------------------------------------------------------------------------- listing


def test_pages_hold_everything_once(hub: Hub) -> None:
    for n in range(25):
        hub.registry.add_version(new(f"a{n:02}"), adapter_may_exist=True)
    hub.registry.add_version(new("a03", "sha256:" + "1" * 64), adapter_may_exist=True)
    seen, token = [], ""
    while True:
        page, token = hub.registry.list_adapters(7, token)
        seen += page
        if not token:
            break
    assert [version.adapter_id for version in seen] == [f"a{n:02}" for n in range(25)]
    assert seen[3].number == 2
    assert hub.registry.list_adapters(25)[1] == ""


def test_versions_are_listed_newest_first_a_page_at_a_time(hub: Hub) -> None:
    for n in range(5):
        hub.registry.add_version(new("a", f"sha256:{n:064}"), adapter_may_exist=True)
    hub.registry.add_version(new("b"), adapter_may_exist=True)
    first, token = hub.registry.list_versions("a", 2)
    second, last = hub.registry.list_versions("a", 3, token)
    assert [version.number for version in first + second] == [5, 4, 3, 2, 1]
    assert {version.adapter_id for version in first + second} == {"a"}
    assert last == ""
    for wrong in (token[:-2], page_token("adapters", "a"), page_token("adapters/a/versions", "x")):
        with pytest.raises(InvalidArgument) as caught:
            hub.registry.list_versions("a", 2, wrong)
        assert caught.value.violations[0].field == "page_token"
    with pytest.raises(InvalidArgument):
        hub.registry.list_versions("b", 2, token)
    with pytest.raises(NotFound) as missing:
        hub.registry.list_versions("aa")
    assert (missing.value.reason, missing.value.violations[0].field) == ("ADAPTER_NOT_FOUND", "parent")


@pytest.mark.parametrize(
    "token", ["x", "!!!!", "AAAA", "é", page_token("tuningJobs", "1"), page_token("adapters", "a")[:-2], "A" * 5000]
)
def test_bad_page_tokens(hub: Hub, token: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        hub.registry.list_adapters(1, token)
    assert caught.value.violations[0].field == "page_token"


@pytest.mark.parametrize("key", ["x", "-1", "9" * 40, ""])
def test_made_up_job_page_tokens(hub: Hub, key: str) -> None:
    with pytest.raises(InvalidArgument):
        hub.jobs.list(1, page_token("tuningJobs", key))


@pytest.mark.parametrize("size", [-1, 1001, 1 << 31])
def test_bad_page_sizes(hub: Hub, size: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        hub.registry.list_adapters(size)
    assert caught.value.violations[0].field == "page_size"


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", HOSTILE_IDS)
async def test_hostile_names_are_refused(hub: Hub, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await hub.resolver.resolve(name)
    assert caught.value.violations[0].field == "model"
    if "@" not in name:
        for call in (hub.registry.get_version, hub.delete_adapter):
            with pytest.raises(InvalidArgument):
                call(name)


async def test_names_resolve_to_versions(hub: Hub) -> None:
    first, second = publish(hub, "a", "[1]"), publish(hub, "a", "[2]")
    assert await hub.resolver.resolve("base") == Resolved("base", 0, None)
    for name, version in [("a", second), ("a@1", first), ("a@2", second)]:
        resolved = await hub.resolver.resolve(name)
        assert (resolved.model, resolved.version) == ("a", version.number)
        assert resolved.adapter is not None
        assert resolved.adapter.digest == version.digest
        assert resolved.adapter.path == str(hub.store.artifact_path(version.digest))
    for name in ("b", "a@3"):
        with pytest.raises(NotFound):
            await hub.resolver.resolve(name)


async def test_versions_of_another_base_are_refused(hub: Hub) -> None:
    publish(hub, "a")
    hub.resolver.base_fingerprint = "another"
    with pytest.raises(FailedPrecondition) as caught:
        await hub.resolver.resolve("a")
    assert caught.value.reason == "BASE_MISMATCH"


# ------------------------------------------------------------------------------------------- leases


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


# ------------------------------------------------------------------------------------------- data sets


def test_datasets_are_registered_once(hub: Hub) -> None:
    for name in ("first.jsonl", "second.jsonl"):
        row = hub.datasets.add("ds-1", display_name=name, format=DatasetFormat.CHAT, row_count=3, size_bytes=4)
        assert row.display_name == "first.jsonl"
    assert hub.datasets.get("ds-1") == row
    assert hub.datasets.ids() == {"ds-1"}
    with pytest.raises(NotFound):
        hub.datasets.get("ds-2")


# ------------------------------------------------------------------------------------------- schema


def test_models_and_migrations_agree(hub: Hub) -> None:
    with create_engine(f"sqlite:///{hub.store.root}/registry.db").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_sqlite_is_set_up_to_be_durable(hub: Hub) -> None:
    with hub.registry._database.read() as session:
        values = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Hub(tmp_path).close()
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(FailedPrecondition, match="newer") as caught:
        Hub(tmp_path)
    assert caught.value.reason == "SCHEMA_NEWER"


def test_a_damaged_database_is_one_clear_error(tmp_path: Path) -> None:
    Hub(tmp_path).close()
    (tmp_path / "registry.db").write_bytes(b"this is no database at all" * 100)
    for _ in range(2):  # and the lock is free again
        with pytest.raises(GraftworkServerError) as caught:
            Hub(tmp_path)
        assert caught.value.reason == "REGISTRY_DAMAGED"
