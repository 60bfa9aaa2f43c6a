"""datasets.py on a real SQLite file."""

from __future__ import annotations

import pytest

from graftwork_server.errors import NotFound
from graftwork_server.hub.hub import Hub
from graftwork_server.types import DatasetFormat


def test_datasets_are_registered_once(hub: Hub) -> None:
    for name in ("first.jsonl", "second.jsonl"):
        row = hub.datasets.add("ds-1", display_name=name, format=DatasetFormat.CHAT, row_count=3, size_bytes=4)
        assert row.display_name == "first.jsonl"
    assert hub.datasets.get("ds-1") == row
    assert hub.datasets.ids() == {"ds-1"}
    with pytest.raises(NotFound):
        hub.datasets.get("ds-2")
