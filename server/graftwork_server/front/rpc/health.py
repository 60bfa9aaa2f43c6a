"""grpc.health.v1 whole: the package's servicer, with List, and with errors as all of ours are."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2

from graftwork_server.errors import NotFound

_Base: Any = health.aio.HealthServicer  # type: ignore[attr-defined]  # loaded lazily by the package


class HealthService(_Base):
    """What the server and each of its services say of themselves."""

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The status of one service, "" for the server. Raises NotFound (SERVICE_NOT_FOUND)."""
        status = self._server_status.get(request.service)
        if status is None:
            known = ", ".join(name for name in sorted(self._server_status) if name)
            raise NotFound(
                f'there is no service {request.service[:120]!r}; there are: {known}, and "" for the server',
                reason="SERVICE_NOT_FOUND",
                field="service",
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        """The status of every service."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)
