"""The address, the time limit and the retries of a client."""

from __future__ import annotations

import re

import pytest

import graftwork


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout"):
        graftwork.Client(timeout=0)
    for address in ("foo", "127.0.0.1", "http://127.0.0.1:8470", "::1:8470", "host:port", "a b:1"):
        with pytest.raises(ValueError, match=f"address is '{re.escape(address)}'; HOST:PORT is accepted"):
            graftwork.Client(address=address)
    for address in ("localhost:1", "[::1]:8470", "unix:/tmp/socket", "dns:///host:1"):
        graftwork.Client(address=address).close()
    with pytest.raises(ValueError, match="max_retries"):
        graftwork.AsyncClient(max_retries=-1)


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_ADDRESS", raising=False)
    assert graftwork.Client().address == "127.0.0.1:8470"
    monkeypatch.setenv("GRAFTWORK_ADDRESS", "10.0.0.1:99")
    assert graftwork.Client().address == "10.0.0.1:99"
    assert graftwork.Client(address="h:1").address == "h:1"
