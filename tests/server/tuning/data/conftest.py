"""Texts that the tests of data sets share."""

from __future__ import annotations

import pytest
from tests.server.tuning.rows_harness import make_text

from graftwork_server.text import TextProcessor


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    """With a chat template."""
    return make_text(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    """Without a chat template."""
    return make_text(tmp_path_factory.mktemp("plain"), template=None)
