"""Which version follows which, and the numbers of deleted ones.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds what a version follows, and the table of deleted names."""
    op.add_column("versions", sa.Column("follows", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("follows", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "deleted_adapters",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("next_number", sa.Integer, nullable=False),
    )
