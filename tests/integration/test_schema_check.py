"""`make check` finds it when the migrations and `jobs.tables` part ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from cli.schema_check import compare, differences, read_schema
from jobs.database import sqlalchemy_url
from tests.support.services import Services


@pytest.fixture(scope="module")
def database(services: Services) -> Iterator[Connection]:
    """A migrated database that no change outlives: Postgres' DDL can be rolled back."""
    with services.database() as url, create_engine(sqlalchemy_url(url), poolclass=NullPool).connect() as connection:
        yield connection


@pytest.fixture
def connection(database: Connection) -> Iterator[Connection]:
    yield database
    database.rollback()


def test_migrated_schema_is_the_declared_one(services: Services) -> None:
    assert compare(services.server.render_as_string(hide_password=False)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE jobs ADD note text", "column jobs.note is made by the migrations but not declared: text"),
        ("DROP INDEX ix_requests_pending", "index ix_requests_pending is declared but no migration makes it"),
        ("ALTER TABLE jobs ALTER priority SET DEFAULT 1", "column jobs.priority differs"),
        ("ALTER TABLE jobs ALTER metadata DROP NOT NULL", "column jobs.metadata differs"),
        ("ALTER TABLE results ALTER seq TYPE bigint", "column results.seq differs"),
        ("ALTER TABLE requests RESET (fillfactor)", "relation requests differs"),
        (
            "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_counters, ADD CONSTRAINT ck_jobs_counters CHECK (total >= 0)",
            "constraint jobs.ck_jobs_counters differs",
        ),
        (
            "DROP INDEX ix_workers_live; CREATE INDEX ix_workers_live ON workers (lease_expires_at)",
            "index ix_workers_live differs",
        ),
    ],
)
def test_schema_check_finds_a_difference(connection: Connection, change: str, found: str) -> None:
    declared = read_schema(connection)
    for statement in change.split("; "):
        connection.execute(text(statement))
    sentences = differences(read_schema(connection), declared)
    assert any(sentence.startswith(found) for sentence in sentences), sentences


def test_compression_may_differ_between_servers(connection: Connection) -> None:
    declared = read_schema(connection)
    connection.execute(text("ALTER TABLE bodies ALTER COLUMN body SET COMPRESSION pglz"))
    assert differences(read_schema(connection), declared) == []
