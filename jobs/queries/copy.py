"""COPY into a table over SQLAlchemy's connection: the fastest way in that Postgres has.

SQLAlchemy has no COPY of its own, and the API's connection is psycopg's asynchronous one under SQLAlchemy's greenlet
bridge, the worker's the plain one; this is the one place that has to know the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import psycopg
from sqlalchemy import Connection
from sqlalchemy.util import await_only


def copy_rows(connection: Connection, table: str, columns: dict[str, str], rows: Iterable[Sequence[object]]) -> None:
    """Append `rows` to `table`; `columns` maps each column to its Postgres type, in the order of a row's values.

    Raises psycopg's own errors (`psycopg.errors.UniqueViolation` …), which SQLAlchemy does not wrap here.
    """
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)"
    types = list(columns.values())
    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.AsyncConnection):
        await_only(_copy_async(driver, statement, types, rows))
        return
    assert isinstance(driver, psycopg.Connection)
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


async def _copy_async(
    driver: psycopg.AsyncConnection[object], statement: str, types: list[str], rows: Iterable[Sequence[object]]
) -> None:
    async with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        for row in rows:
            await copy.write_row(row)
