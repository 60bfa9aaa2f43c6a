"""Run by Alembic for each command. connection.py brings a connection; by hand, `alembic -x url=...` brings a URL."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine

from graftwork_server.hub.database.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    connection = create_engine(context.get_x_argument(as_dictionary=True)["url"]).connect()
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
