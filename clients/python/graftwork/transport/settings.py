"""How a client calls: address, time limit, retries, and what gRPC's channel is told."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Any

from graftwork.transport.retries import Attempts
from graftwork.version import VERSION

DEFAULT_ADDRESS = "127.0.0.1:8470"
_ADDRESS = re.compile(
    r"(?:unix|unix-abstract|dns|ipv4|ipv6|vsock|xds):.+|(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):[0-9]{1,5}"
)
"""HOST:PORT, an IPv6 address in brackets, or one of gRPC's own schemes."""
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_RETRIES = 3
_RECEIVE_BYTES = 64 * 1024 * 1024
_SEND_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """How a client calls.

    address: HOST:PORT. timeout: seconds for each call unless it says otherwise, retries included. max_retries: how
    often a call that may be sent again is sent again.
    """

    address: str
    timeout: float
    max_retries: int

    @classmethod
    def of(cls, address: str | None, timeout: float, max_retries: int) -> Settings:
        """Settings with the address from GRAFTWORK_ADDRESS where none is given. Raises ValueError for bad values."""
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}; expected seconds greater than 0")
        if max_retries < 0:
            raise ValueError(f"max_retries is {max_retries}; expected 0 or more")
        chosen = address or os.environ.get("GRAFTWORK_ADDRESS") or DEFAULT_ADDRESS
        if not _ADDRESS.fullmatch(chosen):
            raise ValueError(f"address is {chosen!r}; HOST:PORT is accepted, such as {DEFAULT_ADDRESS}")
        return cls(chosen, timeout, max_retries)

    def attempts(self, *, retry: bool, timeout: float | None) -> Attempts:
        """The attempts at one call."""
        seconds = self.timeout if timeout is None else timeout
        return Attempts(retry=retry, max_retries=self.max_retries, timeout=seconds)

    def channel_options(self) -> list[tuple[str, Any]]:
        """gRPC channel arguments."""
        options: list[tuple[str, Any]] = [
            ("grpc.primary_user_agent", f"graftwork-python/{VERSION}"),
            ("grpc.max_receive_message_length", _RECEIVE_BYTES),
            ("grpc.max_send_message_length", _SEND_BYTES),
            # Just above the 5 minutes that a gRPC server allows by default, so that no server takes it for abuse.
            ("grpc.keepalive_time_ms", 330_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # A quiet watch sends no data for hours and is to be kept alive all the same.
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own reconnect back-off (1 s to 2 min) would outlast ours and answer our retries from memory.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
        if _is_loopback(self.address):
            # gRPC would send even 127.0.0.1 to the proxy that http_proxy names.
            options.append(("grpc.enable_http_proxy", 0))
        return options


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")
