"""Versions that are kept on the device.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds what is pinned."""
    op.add_column("versions", sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()))
