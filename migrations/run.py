"""Move a database to the newest schema, or back."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from jobs.database import sqlalchemy_url

LOCK = 0x9A6E_3111  # pg_advisory_lock key: two processes that migrate at once take turns


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic is handed a connection, never a URL: `set_main_option` breaks on a percent sign."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate up to `revision`. Safe to call from several processes at once, and when nothing is to be done."""
    _run(database_url, command.upgrade, revision)


def downgrade(database_url: str, revision: str = "base") -> None:
    """Migrate down to `revision`."""
    _run(database_url, command.downgrade, revision)


def _run(database_url: str, action: object, revision: str) -> None:
    assert callable(action)
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
        connection.commit()
        try:
            action(alembic_config(connection), revision)
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
            connection.commit()
