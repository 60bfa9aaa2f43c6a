"""The first schema.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates all tables, in the order in which they refer to each other."""
    _create_adapters()
    _create_datasets()
    _create_jobs()
    _create_requests()


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("next_number", sa.Integer, nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("adapter_id", sa.String(64), sa.ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("strategy", sa.String(100), nullable=False),
        sa.Column("base_fingerprint", sa.String(100), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("parameter_count", sa.BigInteger, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("tuning_job", sa.String(64)),
        sa.Column("create_time", sa.BigInteger, nullable=False),
    )
    op.create_index("versions_by_digest", "versions", ["digest"])


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("display_name", sa.String(200), nullable=False),
        sa.Column("format", sa.String(32), nullable=False),
        sa.Column("row_count", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("base_fingerprint", sa.String(100), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("estimate", sa.Text, nullable=False),
        sa.Column("progress", sa.Text),
        sa.Column("validation_loss", sa.Text),
        sa.Column("publication", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("adapter_version", sa.String(120)),
        sa.Column("error", sa.Text),
        sa.Column("engine_losses", sa.Integer, nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
        sa.Column("start_time", sa.BigInteger),
        sa.Column("end_time", sa.BigInteger),
        sa.UniqueConstraint("id", name="jobs_by_id"),
    )
    op.create_index("jobs_by_state", "jobs", ["state"])
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
    )


def _create_requests() -> None:
    op.create_table(
        "requests",
        sa.Column("method", sa.String(64), primary_key=True),
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("fingerprint", sa.String(80), nullable=False),
        sa.Column("resource", sa.String(200), nullable=False),
        sa.Column("create_time", sa.BigInteger, nullable=False),
    )
