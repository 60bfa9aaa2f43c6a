"""The tables. A change here needs a revision in migrations/versions; a test compares the two."""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def microseconds(time: datetime.datetime) -> int:
    """Microseconds of `time` since 1970 UTC."""
    return (time - _EPOCH) // datetime.timedelta(microseconds=1)


def time_of(microseconds: int) -> datetime.datetime:
    """The time so many microseconds after 1970 UTC."""
    return _EPOCH + datetime.timedelta(microseconds=microseconds)


class UtcTime(TypeDecorator[datetime.datetime]):
    """A time as microseconds since 1970 UTC: the same on every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else microseconds(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime.datetime | None:
        """From the database."""
        return None if value is None else time_of(value)


class Base(DeclarativeBase):
    """Base of all tables."""


class Adapter(Base):
    """A name; it exists as long as it has versions."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    next_number: Mapped[int] = mapped_column(Integer)
    create_time: Mapped[datetime.datetime] = mapped_column(UtcTime)


class Version(Base):
    """A published version. Its digest names files in the store; several versions may have the same."""

    __tablename__ = "versions"
    __table_args__ = (Index("versions_by_digest", "digest"),)

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(80))
    strategy: Mapped[str] = mapped_column(String(100))
    base_fingerprint: Mapped[str] = mapped_column(String(100))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    parameter_count: Mapped[int] = mapped_column(BigInteger)
    rank: Mapped[int] = mapped_column(Integer)
    tuning_job: Mapped[str | None] = mapped_column(String(64))
    pinned: Mapped[bool] = mapped_column(Boolean, server_default=false())
    end_token_ids: Mapped[list[int]] = mapped_column(JSON, server_default="[]")
    follows: Mapped[int] = mapped_column(Integer, server_default="0")
    create_time: Mapped[datetime.datetime] = mapped_column(UtcTime)


class DeletedAdapter(Base):
    """A name that had versions: their numbers are not given again."""

    __tablename__ = "deleted_adapters"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    next_number: Mapped[int] = mapped_column(Integer)


class Dataset(Base):
    """A data set whose lines are in the store."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    display_name: Mapped[str] = mapped_column(String(200))
    format: Mapped[str] = mapped_column(String(32))
    row_count: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    create_time: Mapped[datetime.datetime] = mapped_column(UtcTime)


class Job(Base):
    """A tuning job. Columns of type Text hold JSON; see records.py for their form."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("id", name="jobs_by_id"), Index("jobs_by_state", "state"))

    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(String(64))
    spec: Mapped[str] = mapped_column(Text)
    base_fingerprint: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(16))
    estimate: Mapped[str] = mapped_column(Text)
    progress: Mapped[str | None] = mapped_column(Text)
    validation_loss: Mapped[str | None] = mapped_column(Text)
    publication: Mapped[str | None] = mapped_column(Text)
    result: Mapped[str | None] = mapped_column(Text)
    adapter_version: Mapped[str | None] = mapped_column(String(120))
    error: Mapped[str | None] = mapped_column(Text)
    engine_losses: Mapped[int] = mapped_column(Integer)
    follows: Mapped[int] = mapped_column(Integer, server_default="0")
    create_time: Mapped[datetime.datetime] = mapped_column(UtcTime)
    start_time: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    end_time: Mapped[datetime.datetime | None] = mapped_column(UtcTime)


class JobEventRow(Base):
    """Something that happened to a job; `payload` is JSON of a records.RecordedEvent."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time: Mapped[datetime.datetime] = mapped_column(UtcTime)
    kind: Mapped[str] = mapped_column(String(32))
    payload: Mapped[str] = mapped_column(Text)


class Request(Base):
    """A create call that was answered, so that its repetition gets the same answer."""

    __tablename__ = "requests"

    method: Mapped[str] = mapped_column(String(64), primary_key=True)
    request_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(80))
    resource: Mapped[str] = mapped_column(String(200))
    create_time: Mapped[datetime.datetime] = mapped_column(UtcTime)
