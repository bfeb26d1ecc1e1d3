"""Connections to Postgres: limits on every wait, and databases that are refused in one line."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from jobs.database import (
    ByteaArray,
    Limits,
    UnsupportedDatabase,
    connect,
    connect_async,
    connect_session,
    connect_unpooled,
    sqlalchemy_url,
)
from jobs.settings import Settings
from migrations.run import upgrade
from tests.support.processes import PATIENCE
from tests.support.proxies import proxied
from tests.support.services import Services

LIMITS = Limits(statement=0.4, answer=0.8, ping=0.4)
LET_GO = 9.0  # seconds, less than the ten that psycopg alone gives a server to hear that a query is cancelled
# What PgBouncer takes from a client; it refuses any other parameter.
KNOWN_TO_PGBOUNCER = {"user", "database", "client_encoding", "application_name"}


def test_statement_ends_by_the_servers_limit(database_url: str) -> None:
    with (
        closing_pool(database_url, Limits(statement=0.4, answer=PATIENCE, ping=PATIENCE)) as pool,
        pool.connect() as connection,
        pytest.raises(OperationalError, match="statement timeout"),
    ):
        connection.execute(text(f"SELECT pg_sleep({PATIENCE})"))


def test_pool_gives_up_a_server_that_is_frozen(database_url: str) -> None:
    with proxied(database_url) as (proxy, url), closing_pool(url) as pool:
        with pool.connect() as connection:
            connection.execute(text("SELECT 1"))
            proxy.hang()
            began = time.monotonic()
            with pytest.raises(OperationalError, match=r"did not answer within 0\.8 s"):
                connection.execute(text("SELECT 1"))
            assert time.monotonic() - began < LET_GO
            assert connection.invalidated
        proxy.up()
        with pool.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1


def test_asynchronous_pool_gives_up_a_server_that_is_frozen(database_url: str) -> None:
    async def try_it() -> None:
        with proxied(database_url) as (proxy, url):
            settings = Settings(database_url=url, database_pool_size=1, api_database_timeout=1)
            pool = connect_async(settings, "pagemill tests")
            async with pool.connect() as connection:
                assert (await connection.execute(text("SHOW statement_timeout"))).scalar() == "1s"
                proxy.hang()
                with pytest.raises(OperationalError, match=r"did not answer within 1\.2 s"):
                    await connection.execute(text("SELECT 1"))
            proxy.up()
            async with pool.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
            await pool.dispose()

    asyncio.run(asyncio.wait_for(try_it(), PATIENCE))


def test_pooled_connection_is_pinged_before_use_when_the_server_froze(database_url: str) -> None:
    with proxied(database_url) as (proxy, url), closing_pool(url) as pool:
        with pool.connect() as connection:
            connection.execute(text("SELECT 1"))
        proxy.hang()
        threading.Timer(1.0, proxy.up).start()  # the ping is over by then, the new connection is not
        with pool.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1


def test_session_gives_up_a_server_that_is_frozen(database_url: str) -> None:
    async def try_it() -> None:
        with proxied(database_url) as (proxy, url):
            settings = Settings(database_url=url, api_database_timeout=1)
            async with await connect_session(settings, "pagemill tests") as session:
                proxy.hang()
                with pytest.raises(psycopg.OperationalError, match="did not answer"):
                    await session.execute("SELECT 1")

    asyncio.run(asyncio.wait_for(try_it(), PATIENCE))


def test_cancelled_query_ends_at_once_when_the_server_is_frozen(database_url: str) -> None:
    async def try_it() -> float:
        with proxied(database_url) as (proxy, url):
            pool = connect_async(Settings(database_url=url), "pagemill tests")
            async with pool.connect() as connection:
                proxy.hang()
                began = time.monotonic()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await connection.execute(text("SELECT 1"))
            proxy.up()
            await pool.dispose()
        return time.monotonic() - began

    assert asyncio.run(try_it()) < LET_GO


@pytest.mark.parametrize("kind", ["pool", "session"])
def test_connection_is_closed_at_once_when_its_opening_is_cancelled(kind: str) -> None:
    async def try_it(listener: socket.socket) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        settings = Settings(database_url=f"postgresql://user:secret@127.0.0.1:{listener.getsockname()[1]}/name")
        pool = connect_async(settings, "pagemill tests")
        opening = asyncio.ensure_future(
            pool.connect().start() if kind == "pool" else connect_session(settings, "pagemill tests")
        )
        connection, _ = await loop.sock_accept(listener)
        with closing(connection):
            assert await loop.sock_recv(connection, 1000) != b""
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            # The server sees the end, and keeps no process for the rest of the login.
            assert await asyncio.wait_for(loop.sock_recv(connection, 1000), PATIENCE) == b""

    gc.disable()  # which would close it some day
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            asyncio.run(try_it(listener))
    finally:
        gc.enable()


def test_connecting_brings_only_what_pgbouncer_takes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: dict[str, str] = {}
        server = threading.Thread(target=lambda: seen.update(startup_parameters(listener)), daemon=True)
        server.start()
        url = f"postgresql://user:secret@127.0.0.1:{listener.getsockname()[1]}/name"
        with closing_pool(url) as pool, pytest.raises(OperationalError):
            pool.connect()
        server.join(PATIENCE)
    assert seen["application_name"] == "pagemill tests"
    assert seen.keys() <= KNOWN_TO_PGBOUNCER


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_database_is_refused_when_it_is_not_utf8(services: Services, encoding: str) -> None:
    with database_of(services, encoding) as url:
        for attempt in (lambda: upgrade(url), lambda: connect_unpooled(url, "pagemill tests").connect()):
            with pytest.raises(UnsupportedDatabase, match=f"stores text as {encoding}; Pagemill needs UTF8") as refused:
                attempt()
            assert "\n" not in str(refused.value)


def test_database_is_refused_when_a_newer_version_has_migrated_it(database_url: str) -> None:
    with connect_unpooled(database_url, "pagemill tests").begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UnsupportedDatabase, match=r"newer version of Pagemill \(9999\)") as refused:
        upgrade(database_url)
    assert "\n" not in str(refused.value)


@contextmanager
def closing_pool(url: str, limits: Limits = LIMITS) -> Iterator[Engine]:
    pool = connect(Settings(database_url=url, database_pool_size=1), "pagemill tests", limits)
    try:
        yield pool
    finally:
        pool.dispose()


@contextmanager
def database_of(services: Services, encoding: str) -> Iterator[str]:
    """The URL of an empty database with that encoding."""
    name = f"{services.template}_{encoding.lower()}"
    url = services.server.render_as_string(hide_password=False)
    server = connect_unpooled(url, "pagemill tests").execution_options(isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"))
        try:
            yield sqlalchemy_url(url).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def startup_parameters(listener: socket.socket) -> dict[str, str]:
    """The parameters of one client's startup message; the connection is closed then."""
    connection, _ = listener.accept()
    with closing(connection):
        while True:
            (length,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
            message = connection.recv(length - 4, socket.MSG_WAITALL)
            if struct.unpack("!I", message[:4]) == (196608,):  # version 3.0; the other messages ask for encryption
                words = message[4:].rstrip(b"\0").decode().split("\0")
                return dict(zip(words[::2], words[1::2], strict=True))
            connection.sendall(b"N")


@pytest.mark.parametrize("values", [[bytes(range(256)), b"", None, b"\\x"], [None, None], []])
def test_array_of_bytes_comes_as_it_was(database_url: str, values: list[bytes | None]) -> None:
    with connect_unpooled(database_url, "test").connect() as connection:
        statement = text("SELECT CAST(:values AS bytea[])")
        assert connection.execute(statement, {"values": ByteaArray(values)}).scalar() == values


def test_array_of_bytes_is_sent_in_binary() -> None:
    transformer = Transformer()
    transformer.dump_sequence([ByteaArray([b"\0" * 500])], [PyFormat.AUTO])
    assert transformer.formats == [Format.BINARY]
