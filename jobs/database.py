"""Connections to Postgres, the same for every process: bounded pools, and time limits on every wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExecutionContext, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from jobs.settings import Settings

T = TypeVar("T")

CONNECT_TIMEOUT = 3  # seconds
CANCEL_TIMEOUT = 0.5  # seconds for a cancel request to reach the server
POOL_TIMEOUT = 10  # seconds
# Execution options of a statement whose rows come as Postgres keeps them and not as text: bytea in half the bytes.
BINARY_RESULTS = {"binary_results": True}


class ByteaArray(list[bytes | None]):
    """An array of bytea as a parameter, which goes to Postgres as it is.

    Of a plain list psycopg makes text, two characters a byte, and escapes each value: of 500 bytes that takes 36 µs,
    most of what a group of results costs its worker.
    """


psycopg.adapters.register_dumper(ByteaArray, ListBinaryDumper)

# A peer that went away without a word is noticed before a worker's lease ends.
TCP_OPTIONS = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. The server ends a statement after `statement`; the client gives up a server that is silent for `answer`.

    The client's limit is for a server that is frozen or cut off without an error: TCP keeps such a connection open.
    `ping` is how long a connection that comes out of the pool may take to show that it lives. The server ends a session
    whose open transaction has waited for its client for `idle`, because a frozen process would keep its locks.
    """

    statement: float
    answer: float
    ping: float
    idle: float = 60.0


# Of workers and the courier: their longest statement moves one chunk of rows.
THREADS = Limits(statement=30.0, answer=35.0, ping=float(CONNECT_TIMEOUT))


def api_limits(settings: Settings) -> Limits:
    """Limits of the API: the client that asks should hear of a frozen server while it still waits."""
    statement = settings.api_database_timeout
    return Limits(statement, answer=statement * 1.2, ping=min(statement, CONNECT_TIMEOUT))


class DatabaseNotConfigured(RuntimeError):
    """PAGEMILL_DATABASE_URL is not set, and this command does not start a Postgres of its own."""

    def __init__(self) -> None:
        super().__init__(
            "PAGEMILL_DATABASE_URL is not set. `pagemill up` brings a Postgres of its own; every other process is told "
            "where one is, e.g. PAGEMILL_DATABASE_URL=postgresql://user:password@host/pagemill"
        )


class UnsupportedDatabase(RuntimeError):
    """The database can be reached, and cannot be used. `str(error)` is one line that says why."""


def sqlalchemy_url(database_url: str) -> URL:
    """Accept the usual spellings (`postgres://`, `postgresql://`) and name our driver."""
    if database_url.startswith("postgres://"):
        database_url = "postgresql://" + database_url.removeprefix("postgres://")
    return make_url(database_url).set(drivername="postgresql+psycopg")


def connect(settings: Settings, application: str, limits: Limits = THREADS) -> Engine:
    """A pool for threads. `application` shows in pg_stat_activity."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    engine = create_engine(
        sqlalchemy_url(settings.database_url), connect_args=_connect_args(application), **_pool_options(settings)
    )
    # A worker frozen within a claim holds its own row's lock, which the reaper needs once its lease is over.
    _prepare(engine, replace(limits, idle=min(limits.idle, settings.lease)))
    return engine


def connect_unpooled(database_url: str, application: str, limits: Limits | None = None) -> Engine:
    """Connections that close after use, for commands. Without `limits` a statement may take as long as it needs."""
    engine = create_engine(
        sqlalchemy_url(database_url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args=_connect_args(application),
    )
    _prepare(engine, limits)
    return engine


def connect_async(settings: Settings, application: str) -> AsyncEngine:
    """A pool for asyncio. Queries stay plain functions: `await connection.run_sync(query, ...)`."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    limits = api_limits(settings)

    async def create(**arguments: Any) -> psycopg.AsyncConnection[Any]:
        return await _AsyncConnection.within(limits, **arguments)

    engine = create_async_engine(
        sqlalchemy_url(settings.database_url),
        connect_args={**_connect_args(application), "async_creator_fn": create},
        **_pool_options(settings),
    )
    event.listen(engine.sync_engine, "connect", _begin_session(limits), insert=True)
    return engine


async def connect_session(settings: Settings, application: str) -> psycopg.AsyncConnection[Any]:
    """One session outside any pool, in autocommit: what it holds ends with it, and it ends with its process."""
    if settings.database_url is None:
        raise DatabaseNotConfigured
    # Every statement is in autocommit here, and has the whole limit.
    limits = replace(api_limits(settings), ping=api_limits(settings).answer)
    url = sqlalchemy_url(settings.database_url)
    _, where = url.get_dialect()().create_connect_args(url)
    session = await _AsyncConnection.within(limits, autocommit=True, **{**where, **_connect_args(application)})
    # The keepalives are for the server: it ends the session if the whole machine of this process goes silent.
    await session.execute(
        """
        SELECT set_config('statement_timeout', %s, false),
               set_config('tcp_keepalives_idle', '5', false),
               set_config('tcp_keepalives_interval', '2', false),
               set_config('tcp_keepalives_count', '3', false)
        """,
        [_milliseconds(limits.statement)],
    )
    return session


class _Connection(psycopg.Connection[Any]):
    """A connection whose every wait for the server ends after `limits`."""

    limits: Limits | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        limit = timeout if timeout is not None else _limit(self, self.limits)
        try:
            return super().wait(gen, interval, limit)
        except psycopg.errors._WaitTimeout:
            raise _gave_up(self, limit) from None


class _AsyncConnection(psycopg.AsyncConnection[Any]):
    """The same for asyncio."""

    limits: Limits | None = None

    @classmethod
    async def within(cls, limits: Limits, **arguments: Any) -> Self:
        """Connect, and keep to `limits` from then on."""
        try:
            connection = await cls.connect(**arguments)
        except asyncio.CancelledError as cancelled:
            # The frames of psycopg hold the socket, and SQLAlchemy keeps them in a cycle: the server would wait for
            # the rest of the login until the next garbage collection, or its authentication_timeout.
            raise cancelled.with_traceback(None) from None
        connection.limits = limits
        return connection

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        limit = timeout if timeout is not None else _limit(self, self.limits)
        try:
            return await super().wait(gen, interval, limit)
        except psycopg.errors._WaitTimeout:
            raise _gave_up(self, limit) from None

    async def _try_cancel(self, *, timeout: float = CANCEL_TIMEOUT) -> None:
        """Tell the server that the query is cancelled; close the connection where it does not listen.

        psycopg calls it with 5 s, and waits 5 s more for the query's end: a caller with a deadline would have to wait.
        """
        try:
            await self.cancel_safe(timeout=min(timeout, CANCEL_TIMEOUT))
        except psycopg.Error:
            self.pgconn.finish()


def _limit(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], limits: Limits | None) -> float | None:
    if limits is None:
        return None
    # A pool pings in autocommit, and runs nothing else in it.
    return limits.ping if connection.autocommit else limits.answer


def _gave_up(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], limit: float | None
) -> psycopg.OperationalError:
    """Close a connection whose server did not answer: a late answer would be read as that of the next query."""
    connection.pgconn.finish()
    return psycopg.OperationalError(f"the server did not answer within {limit:g} s")


def _connect_args(application: str) -> dict[str, Any]:
    # No `options`: PgBouncer refuses a connection that brings them.
    return {"application_name": application, "connect_timeout": CONNECT_TIMEOUT, **TCP_OPTIONS}


def _pool_options(settings: Settings) -> dict[str, Any]:
    return {
        "hide_parameters": True,  # prompts and results stay out of every error and log
        "pool_size": settings.database_pool_size,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "pool_pre_ping": True,
    }


def _prepare(engine: Engine, limits: Limits | None) -> None:
    def create(dialect: object, record: object, cargs: object, arguments: dict[str, Any]) -> _Connection:
        connection = _Connection.connect(**arguments)
        connection.limits = limits
        return connection

    event.listen(engine, "do_connect", create)
    # First of the listeners: SQLAlchemy asks for the version next, and cannot read it where the encoding is SQL_ASCII.
    event.listen(engine, "connect", _begin_session(limits), insert=True)
    event.listen(engine, "before_cursor_execute", _choose_format)


def _begin_session(limits: Limits | None) -> Callable[[DBAPIConnection, ConnectionPoolEntry], None]:
    """Check a new connection's server, and set its timeouts."""

    def begin(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        driver = record.driver_connection
        assert isinstance(driver, psycopg.Connection | psycopg.AsyncConnection)
        encoding = driver.info.parameter_status("server_encoding")
        if encoding not in (None, "UTF8"):
            name = driver.info.dbname
            connection.close()
            raise UnsupportedDatabase(
                f"The database {name!r} stores text as {encoding}; Pagemill needs UTF8. Make one with: "
                "CREATE DATABASE pagemill ENCODING 'UTF8' TEMPLATE template0"
            )
        if limits is None:
            return
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(
            """
            SELECT set_config('statement_timeout', %s, false),
                   set_config('idle_in_transaction_session_timeout', %s, false)
            """,
            [_milliseconds(limits.statement), _milliseconds(limits.idle)],
        )
        cursor.close()
        connection.autocommit = False

    return begin


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _choose_format(
    connection: Connection,
    cursor: psycopg.Cursor[Any],
    statement: str,
    parameters: object,
    context: ExecutionContext,
    executemany: bool,
) -> None:
    """Let psycopg read binary rows where the statement asks for them; SQLAlchemy has no word for formats."""
    if context.execution_options.get("binary_results"):
        cursor.format = psycopg.pq.Format.BINARY


def brief(error: SQLAlchemyError) -> str:
    """The database's own words in one line, without the statement and its parameters, which hold prompts."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
