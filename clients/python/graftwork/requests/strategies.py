"""Calls of StrategyService."""

from __future__ import annotations

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import resource_name
from graftwork.responses import strategies as responses
from graftwork.transport.calls import Page, Unary
from graftwork.v1 import strategies_pb2 as pb

_SERVICE = "/graftwork.v1.StrategyService/"


def list_strategies(page_size: int, token: str) -> Unary[pb.ListStrategiesResponse, Page[types.Strategy]]:
    """ListStrategies, one page."""
    request = build(pb.ListStrategiesRequest, page_size=page_size, page_token=token)
    return Unary(_SERVICE + "ListStrategies", request, pb.ListStrategiesResponse, responses.strategy_page, retry=True)


def get_strategy(strategy: str) -> Unary[pb.GetStrategyResponse, types.Strategy]:
    """GetStrategy, by id or resource name."""
    request = build(pb.GetStrategyRequest, name=resource_name("strategies", strategy))
    return Unary(_SERVICE + "GetStrategy", request, pb.GetStrategyResponse, responses.strategy, retry=True)
