"""The three kinds of call: what to send, how to read the answer, whether it may be sent again.

requests/ builds them, the transports carry them out; so the sync and the async client differ in how they wait only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar


class Message(Protocol):
    """The part of a protobuf message that a transport needs."""

    def SerializeToString(self) -> bytes: ...

    @classmethod
    def FromString(cls, s: bytes, /) -> Self: ...


R = TypeVar("R", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True)
class Unary(Generic[R, T]):
    """One request, one response. retry: sending it twice does no more than sending it once."""

    path: str
    request: Message
    response: type[R]
    parse: Callable[[R], T]
    retry: bool = field(kw_only=True)


@dataclass(frozen=True)
class Upload(Generic[R, T]):
    """A stream of requests, one response. messages is called anew for each attempt."""

    path: str
    messages: Callable[[], Iterator[Message]]
    response: type[R]
    parse: Callable[[R], T]


@dataclass(frozen=True)
class Streaming(Generic[R, T]):
    """One request, a stream of responses."""

    path: str
    request: Message
    response: type[R]
    parse: Callable[[R], T]


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; next_page_token is "" on the last."""

    items: tuple[T, ...]
    next_page_token: str


def serializers(response: type[R]) -> dict[str, Any]:
    """The arguments that tell gRPC how a request becomes bytes, and how bytes become a response."""
    return {
        "request_serializer": lambda request: request.SerializeToString(),
        "response_deserializer": response.FromString,
    }
