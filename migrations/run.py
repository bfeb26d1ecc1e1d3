"""Move a database to the newest schema, or back."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from jobs.database import UnsupportedDatabase, connect_unpooled

LOCK = 0x9A6E_3111  # pg_advisory_lock key: two processes that migrate at once take turns


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic is handed a connection, never a URL: `set_main_option` breaks on a percent sign."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate up to `revision`. Safe to call from several processes at once, and when nothing is to be done.

    Raises `UnsupportedDatabase` if a newer version of Pagemill has migrated it.
    """
    _run(database_url, command.upgrade, revision)


def downgrade(database_url: str, revision: str = "base") -> None:
    """Migrate down to `revision`."""
    _run(database_url, command.downgrade, revision)


def _run(database_url: str, action: object, revision: str) -> None:
    assert callable(action)
    # Without limits: the lock waits for another process that migrates, and a migration may rewrite a large table.
    with connect_unpooled(database_url, "pagemill migrate").connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
        connection.commit()
        try:
            config = alembic_config(connection)
            _refuse_newer(connection, config)
            action(config, revision)
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
            connection.commit()


def _refuse_newer(connection: Connection, config: Config) -> None:
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise UnsupportedDatabase(
                f"The database has the schema of a newer version of Pagemill ({revision}); this one knows "
                f"{script.get_current_head()}. Install the newer version, or use another database."
            )
