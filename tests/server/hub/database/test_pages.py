"""pages.py: listings a page at a time, on a real SQLite file."""

from __future__ import annotations

import pytest
from tests.server.hub.hub_harness import new

from graftwork_server.errors import InvalidArgument, NotFound
from graftwork_server.hub.database.pages import page_token
from graftwork_server.hub.hub import Hub


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
