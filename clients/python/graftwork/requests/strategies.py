"""Calls of StrategyService."""

from __future__ import annotations

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import resource_name
from graftwork.responses import strategies as responses
from graftwork.transport.calls import Page, Unary
from graftwork.v1 import strategies_pb2

_SERVICE = "/graftwork.v1.StrategyService/"


def list_strategies(page_size: int, token: str) -> Unary[strategies_pb2.ListStrategiesResponse, Page[types.Strategy]]:
    """ListStrategies, one page."""
    return Unary(
        path=_SERVICE + "ListStrategies",
        request=build(strategies_pb2.ListStrategiesRequest, page_size=page_size, page_token=token),
        response=strategies_pb2.ListStrategiesResponse,
        parse=responses.strategy_page,
        retry=True,
    )


def get_strategy(strategy: str) -> Unary[strategies_pb2.GetStrategyResponse, types.Strategy]:
    """GetStrategy, by id or resource name."""
    return Unary(
        path=_SERVICE + "GetStrategy",
        request=build(strategies_pb2.GetStrategyRequest, name=resource_name("strategies", strategy)),
        response=strategies_pb2.GetStrategyResponse,
        parse=responses.strategy,
        retry=True,
    )
