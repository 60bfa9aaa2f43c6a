"""StrategyService: the strategies that the engine found, those that failed to load included."""

from __future__ import annotations

import grpc

from graftwork.v1 import strategies_pb2 as pb
from graftwork.v1.strategies_pb2_grpc import StrategyServiceServicer
from graftwork_server.errors import NotFound
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.rpc.convert import strategy_message
from graftwork_server.hub.database.pages import check_page_size, page_after, page_token
from graftwork_server.names import parse_strategy


class StrategyService(StrategyServiceServicer):
    """Reads what the engine said at its start."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def ListStrategies(
        self, request: pb.ListStrategiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListStrategiesResponse:
        """Strategies by id, a page at a time."""
        size, after = check_page_size(request.page_size), page_after("strategies", request.page_token) or ""
        rest = sorted((info for info in self._engine.strategies if info.id > after), key=lambda info: info.id)
        return pb.ListStrategiesResponse(
            strategies=[strategy_message(info) for info in rest[:size]],
            next_page_token=page_token("strategies", rest[size - 1].id) if len(rest) > size else "",
        )

    async def GetStrategy(
        self, request: pb.GetStrategyRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStrategyResponse:
        """One strategy."""
        wanted = parse_strategy(request.name)
        for info in self._engine.strategies:
            if info.id == wanted:
                return pb.GetStrategyResponse(strategy=strategy_message(info))
        known = ", ".join(sorted(info.id for info in self._engine.strategies))
        raise NotFound(f"there is no strategy {wanted!r}; there are {known}", reason="STRATEGY_NOT_FOUND")
