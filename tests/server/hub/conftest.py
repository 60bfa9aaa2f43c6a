from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork_server.hub.hub import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path / "data")
    yield hub
    hub.close()
