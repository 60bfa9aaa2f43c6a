"""From the name in a request to what the engine needs to serve it."""

from __future__ import annotations

import asyncio

import msgspec

from graftwork_server.errors import FailedPrecondition
from graftwork_server.hub.database.records import VersionRecord
from graftwork_server.hub.files.store import Store
from graftwork_server.hub.registry import Registry
from graftwork_server.names import BASE, parse_model
from graftwork_server.types import AdapterRef


class Resolved(msgspec.Struct, frozen=True):
    """Who answers: the base (adapter None, version 0) or a version of an adapter."""

    model: str
    version: int
    adapter: AdapterRef | None


class Resolver:
    """Turns names into versions. An unknown name is NotFound, never the base.

    `base_fingerprint`: versions that belong to another base model are refused.
    """

    def __init__(self, store: Store, registry: Registry, base_fingerprint: str | None = None) -> None:
        self._store = store
        self._registry = registry
        self.base_fingerprint = base_fingerprint

    async def resolve(self, model: str, field: str = "model") -> Resolved:
        """`model`: "base", an adapter id (its newest version) or "id@version".

        Raises InvalidArgument for what is no name, NotFound (ADAPTER_NOT_FOUND, VERSION_NOT_FOUND), FailedPrecondition
        (BASE_MISMATCH).
        """
        if model == BASE:
            return Resolved(BASE, 0, None)
        adapter_id, number = parse_model(model, field)
        version = self._registry.recent_version(adapter_id, number)
        if version is None:
            version = await asyncio.to_thread(self._registry.get_version, adapter_id, number, field)
        return self.resolved(version)

    def resolved(self, version: VersionRecord) -> Resolved:
        """`version` as the engine needs it. Raises FailedPrecondition (BASE_MISMATCH)."""
        if self.base_fingerprint is not None and version.base_fingerprint != self.base_fingerprint:
            raise FailedPrecondition(
                f"{version.name} was made for another base model than this server hosts; start the server with that "
                "model, or publish a version for this one",
                reason="BASE_MISMATCH",
                metadata={"adapter_base": version.base_fingerprint, "server_base": self.base_fingerprint},
            )
        return Resolved(version.adapter_id, version.number, self.adapter_ref(version))

    def adapter_ref(self, version: VersionRecord) -> AdapterRef:
        """What the engine needs to serve `version`."""
        path = str(self._store.artifact_path(version.digest))
        return AdapterRef(
            digest=version.digest,
            path=path,
            strategy=version.strategy,
            end_token_ids=version.end_token_ids,
            name=version.name,
        )
