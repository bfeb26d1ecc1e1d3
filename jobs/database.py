"""Connections to Postgres, the same for every process: bounded pools, and time limits on everything that may hang."""

from __future__ import annotations

from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExecutionContext, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from jobs.settings import Settings

CONNECT_TIMEOUT = 3  # seconds
STATEMENT_TIMEOUT = 30_000  # milliseconds; the longest statement that we issue moves one chunk of rows
# Execution options of a statement whose rows come as Postgres keeps them and not as text: bytea in half the bytes.
BINARY_RESULTS = {"binary_results": True}
# A peer that went away without a word is noticed before a worker's lease ends.
TCP_OPTIONS = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class DatabaseNotConfigured(RuntimeError):
    """PAGEMILL_DATABASE_URL is not set, and this command does not start a Postgres of its own."""

    def __init__(self) -> None:
        super().__init__(
            "PAGEMILL_DATABASE_URL is not set. `pagemill up` brings a Postgres of its own; every other process is told "
            "where one is, e.g. PAGEMILL_DATABASE_URL=postgresql://user:password@host/pagemill"
        )


def sqlalchemy_url(database_url: str) -> URL:
    """Accept the usual spellings (`postgres://`, `postgresql://`) and name our driver."""
    if database_url.startswith("postgres://"):
        database_url = "postgresql://" + database_url.removeprefix("postgres://")
    return make_url(database_url).set(drivername="postgresql+psycopg")


def _connect_args(application: str) -> dict[str, Any]:
    return {
        "application_name": application,
        "connect_timeout": CONNECT_TIMEOUT,
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT} -c idle_in_transaction_session_timeout=60000",
        **TCP_OPTIONS,
    }


def _options(settings: Settings, application: str) -> dict[str, object]:
    return {
        "hide_parameters": True,  # prompts and results stay out of every error and log
        "pool_size": settings.database_pool_size,
        "max_overflow": 0,
        "pool_timeout": 10,
        "pool_pre_ping": True,
        "connect_args": _connect_args(application),
    }


def connect(settings: Settings, application: str) -> Engine:
    """A pool for threads. `application` shows in pg_stat_activity."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    engine = create_engine(sqlalchemy_url(settings.database_url), **_options(settings, application))
    event.listen(engine, "before_cursor_execute", _choose_format)
    return engine


def _choose_format(
    connection: Connection,
    cursor: psycopg.Cursor[Any],
    statement: str,
    parameters: object,
    context: ExecutionContext,
    executemany: bool,
) -> None:
    """SQLAlchemy knows nothing of formats; psycopg reads both."""
    if context.execution_options.get("binary_results"):
        cursor.format = psycopg.pq.Format.BINARY


def connect_async(settings: Settings, application: str) -> AsyncEngine:
    """A pool for asyncio. Queries stay plain functions: `await connection.run_sync(query, ...)`."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    return create_async_engine(sqlalchemy_url(settings.database_url), **_options(settings, application))


async def connect_session(settings: Settings, application: str) -> psycopg.AsyncConnection:
    """One session outside any pool, in autocommit: what it holds ends with it, and it ends with its process."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    url = sqlalchemy_url(settings.database_url)
    _, where = url.get_dialect()().create_connect_args(url)
    arguments = {**where, **_connect_args(application)}
    # Where the whole machine of this process goes silent, it is for the server to notice.
    arguments["options"] += " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"
    return await psycopg.AsyncConnection.connect(autocommit=True, **arguments)


def brief(error: SQLAlchemyError) -> str:
    """The database's own words in one line, without the statement and its parameters, which hold prompts."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
