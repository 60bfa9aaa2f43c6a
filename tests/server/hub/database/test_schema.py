"""The schema on a real SQLite file: what it is, and what it must not be."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from graftwork_server.errors import FailedPrecondition, GraftworkServerError
from graftwork_server.hub.database.tables import Base
from graftwork_server.hub.hub import Hub


def test_models_and_migrations_agree(hub: Hub) -> None:
    with create_engine(f"sqlite:///{hub.store.root}/registry.db").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_sqlite_is_set_up_to_be_durable(hub: Hub) -> None:
    with hub.registry._database.read() as session:
        values = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Hub(tmp_path).close()
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(FailedPrecondition, match="newer") as caught:
        Hub(tmp_path)
    assert caught.value.reason == "SCHEMA_NEWER"


def test_a_damaged_database_is_one_clear_error(tmp_path: Path) -> None:
    Hub(tmp_path).close()
    (tmp_path / "registry.db").write_bytes(b"this is no database at all" * 100)
    for _ in range(2):  # and the lock is free again
        with pytest.raises(GraftworkServerError) as caught:
            Hub(tmp_path)
        assert caught.value.reason == "REGISTRY_DAMAGED"
