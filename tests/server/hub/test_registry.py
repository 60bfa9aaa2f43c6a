"""registry.py on a real SQLite file."""

from __future__ import annotations

import pytest
from tests.server.hub.hub_harness import new, publish

from graftwork_server.errors import AlreadyExists, InvalidArgument, NotFound
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.registry import request_key

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


def test_unknown_adapters_get_a_hint(hub: Hub) -> None:
    for adapter_id in ("dates-v1", "dates-v2", "dates-v3", "dates-v4", "other"):
        hub.registry.add_version(new(adapter_id), adapter_may_exist=False)
    with pytest.raises(NotFound) as caught:
        hub.registry.get_version("dates-v")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"
    assert caught.value.message.count("dates-v") == 4
    assert "other" not in caught.value.message


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
