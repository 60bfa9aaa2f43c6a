"""Answers of StrategyService."""

from __future__ import annotations

import json
from typing import Any

from graftwork import types
from graftwork.responses.fields import from_message
from graftwork.transport.calls import Page
from graftwork.v1 import strategies_pb2 as pb


def _strategy(message: pb.Strategy) -> types.Strategy:
    try:
        schema: Any = json.loads(message.config_json_schema or "{}")
    except ValueError:
        # A plugin's schema comes from outside; an unreadable one must not hide the strategy.
        schema = {}
    return from_message(
        types.Strategy,
        message,
        capabilities=tuple(message.capabilities),
        config_schema=schema if isinstance(schema, dict) else {},
    )


def strategy(message: pb.GetStrategyResponse) -> types.Strategy:
    """A strategy."""
    return _strategy(message.strategy)


def strategy_page(message: pb.ListStrategiesResponse) -> Page[types.Strategy]:
    """One page of strategies."""
    return Page(tuple(_strategy(item) for item in message.strategies), message.next_page_token)
