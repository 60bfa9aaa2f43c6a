"""resolver.py: what a name stands for."""

from __future__ import annotations

import pytest
from tests.server.hub.hub_harness import publish

from graftwork_server.errors import FailedPrecondition, InvalidArgument, NotFound
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.resolver import Resolved

HOSTILE_IDS = [
    "", ".", "..", "../x", "a/b", "/a", "a\\b", "a\n", "a\0b", "ü", "\u202ea", "a b", "-a", "_a", ".a", "a" * 65, "a@0",
    "a@", "a@x", "a@-1", "a@1@2", "a@01", "a@1\n", "a@" + "9" * 30, "a@²", "@1", "a%2e", "~", "$(x)", "a;b", "a'b", "*",
]  # fmt: skip


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
