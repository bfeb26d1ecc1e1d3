"""The servers under every other test: embedded ones, or those named by PAGEMILL_TEST_*_URL."""

from __future__ import annotations

from contextlib import closing

import pytest
import redis
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.pool import NullPool

from jobs.tables import metadata
from tests.support.services import Services


def _tables(url: str) -> set[str]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return set(inspect(connection).get_table_names())


def test_database_is_fresh_and_migrated(services: Services) -> None:
    expected = {*metadata.tables, "alembic_version"}
    with services.database() as one, services.database() as two:
        with create_engine(one, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE TABLE only_here ()"))
        assert _tables(one) == {*expected, "only_here"}
        assert _tables(two) == expected


def test_empty_database_has_no_tables(empty_database_url: str) -> None:
    assert _tables(empty_database_url) == set()


def test_database_is_dropped_while_a_client_is_connected(services: Services) -> None:
    with services.database() as url:
        connection = create_engine(url, poolclass=NullPool).connect()
    with pytest.raises(Exception, match=r"terminating connection|closed"):
        connection.execute(text("SELECT 1"))
    connection.invalidate()
    connection.close()


def test_redis_database_is_empty(services: Services) -> None:
    first = services.redis_database()
    with closing(redis.Redis.from_url(first)) as client:
        client.set("left", "over")
    with closing(redis.Redis.from_url(services.redis_database())) as client:
        assert client.dbsize() == 0
