"""Tokens that end what a version writes.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the tokens that end a version's texts."""
    op.add_column("versions", sa.Column("end_token_ids", sa.JSON, nullable=False, server_default="[]"))
