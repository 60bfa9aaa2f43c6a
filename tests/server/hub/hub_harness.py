"""What the tests of the hub share: a version to register, and files to publish."""

from __future__ import annotations

from graftwork_server.hub.database.records import NewVersion, VersionRecord
from graftwork_server.hub.hub import Hub
from graftwork_server.types import ArtifactInfo

INFO = ArtifactInfo(strategy="lora", parameter_count=10, rank=4, modules_bound=2)


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
