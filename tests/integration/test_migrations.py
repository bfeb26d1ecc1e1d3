"""The schema goes up, down and up again, and is what `jobs.tables` says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

from cli.main import app
from jobs.database import sqlalchemy_url
from jobs.tables import metadata
from migrations.run import downgrade, upgrade


def _engine(database_url: str) -> Engine:
    return create_engine(sqlalchemy_url(database_url), poolclass=NullPool)


def _tables(database_url: str) -> set[str]:
    return set(inspect(_engine(database_url)).get_table_names())


def _differences(database_url: str) -> list[object]:
    with _engine(database_url).connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def test_schema_is_the_declared_one_after_up_down_up(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    assert _tables(empty_database_url) == {table.name for table in metadata.sorted_tables} | {"alembic_version"}
    assert _differences(empty_database_url) == []
    downgrade(empty_database_url)
    assert _tables(empty_database_url) == {"alembic_version"}
    upgrade(empty_database_url)
    assert _differences(empty_database_url) == []


def test_upgrade_changes_nothing_when_the_schema_is_the_newest(database_url: str) -> None:
    upgrade(database_url)
    assert _differences(database_url) == []


def test_database_of_a_newer_version_is_refused_in_one_line(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _engine(database_url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_later'"))
    monkeypatch.setenv("PAGEMILL_DATABASE_URL", database_url)
    result = CliRunner().invoke(app, ["migrate"])
    assert result.exit_code == 1
    assert result.stderr.startswith("The database has the schema of a newer version of Pagemill (9999_later)")
    assert len(result.stderr.splitlines()) == 1


def test_concurrent_upgrades_take_turns(empty_database_url: str) -> None:
    start = threading.Barrier(3)

    def migrate() -> None:
        start.wait()
        upgrade(empty_database_url)

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(migrate) for _ in range(3)]:
            future.result()
    assert _differences(empty_database_url) == []
