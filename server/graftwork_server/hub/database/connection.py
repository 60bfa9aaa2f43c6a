"""Opens the registry's database: SQLite unless told otherwise, brought to this server's schema first."""

from __future__ import annotations

import contextlib
import datetime
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from graftwork_server.errors import FailedPrecondition, ResourceExhausted, Unavailable
from graftwork_server.hub.files.reserve import RESERVE, RESERVE_BYTES, Reserve

_BUSY_TIMEOUT_MS = 10_000
_WRITES = "graftwork_writes"

_log = logging.getLogger(__name__)


class Database:
    """Transactions on the registry's database. Blocking; may be used from several threads.

    Raises FailedPrecondition (SCHEMA_NEWER) for the database of a newer server, (REGISTRY_DAMAGED) for one that
    cannot be read, ResourceExhausted (STORAGE_FULL).
    """

    def __init__(self, url: str, reserve: Reserve | None = None) -> None:
        self._engine = create_engine(url)
        self._reserve = reserve
        self.writes = 0
        """Transactions that this process has ended: what it read before the last of them may no longer be true."""
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(**{_WRITES: True})
        try:
            self._open()
        except DatabaseError as error:
            self.close()
            if _is_full(error):
                raise ResourceExhausted(
                    "the disk is full: there is no room for the registry's database", reason="STORAGE_FULL"
                ) from error
            raise FailedPrecondition(
                f"the registry's database cannot be opened: {error.orig}", reason="REGISTRY_DAMAGED"
            ) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def at(cls, path: Path) -> Database:
        """The SQLite database in file `path`, created if need be."""
        return cls(f"sqlite:///{path}", Reserve(path.with_name(RESERVE)))

    def _open(self) -> None:
        try:
            _migrate(self._writing)
        except OperationalError:
            if self._reserve is None:
                raise
            # If the disk is full, what is said depends on the file that found it so. A server must start then: deleting
            # is done through it.
            self._reserve.give()
            _migrate(self._writing)

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with _database_errors(), Session(self._engine) as session:
            yield session

    @contextmanager
    def write(self, *, makes_room: bool = False) -> Iterator[Session]:
        """One transaction, the only one that writes now; committed at the end, rolled back on any error.

        makes_room: it forgets something, or lets go of it. It has the reserve, so that it works on a full disk.
        """
        if makes_room and self._reserve is not None:
            self._reserve.give()
        try:
            with _database_errors(), Session(self._writing) as session, session.begin():
                yield session
        finally:
            self.writes += 1
            if self._reserve is not None:
                if makes_room:
                    self._shorten_log()
                if not self._reserve.held:
                    self._reserve.keep()

    def _shorten_log(self) -> None:
        """Moves what the write-ahead log holds to its place, and cuts it, unless somebody reads it now."""
        with contextlib.suppress(OperationalError), contextlib.closing(self._engine.raw_connection()) as connection:
            cursor = connection.cursor()
            try:
                cursor.execute("PRAGMA busy_timeout = 0")
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.OperationalError as error:
                _log.debug("the write-ahead log stays as it is: %s", error)
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
                cursor.close()


def now() -> datetime.datetime:
    """The time of a row that is written now."""
    return datetime.datetime.now(datetime.UTC)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if _is_full(error):
            raise ResourceExhausted("the server's disk is full; nothing was changed", reason="STORAGE_FULL") from error
        raise Unavailable(f"the registry cannot be used now: {error.orig}", reason="STORAGE_FAILED") from error


def _is_full(error: DatabaseError) -> bool:
    return "disk is full" in str(error.orig)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun by _begin_sqlite; the driver's own notion of them begins too late for reads.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        f"journal_size_limit = {RESERVE_BYTES}",
        "temp_store = MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later cannot wait for another writer, so writers say so at the start.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise FailedPrecondition(
                f"the data directory was written by a newer graftwork (schema {current}); use that one, or another "
                "data directory",
                reason="SCHEMA_NEWER",
            )
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
