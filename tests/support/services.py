"""Real Postgres and Redis for tests: embedded ones, or yours.

PAGEMILL_TEST_DATABASE_URL and PAGEMILL_TEST_REDIS_URL name servers of yours. The database user must be allowed to
create databases; the Redis databases 1 to 15 are emptied.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from jobs.database import sqlalchemy_url
from migrations.run import upgrade

REDIS_DATABASES = range(1, 16)


@dataclass(frozen=True)
class Services:
    """Servers, and what makes fresh databases on them."""

    server: URL
    redis_url: str
    template: str = field(default_factory=lambda: f"pagemill_test_{secrets.token_hex(4)}")
    _redis_databases: Iterator[int] = field(default_factory=lambda: itertools.cycle(REDIS_DATABASES))

    def create_template(self) -> None:
        self._execute(f'CREATE DATABASE "{self.template}"')
        upgrade(_render(self.server.set(database=self.template)))

    def drop_template(self) -> None:
        self._execute(f'DROP DATABASE "{self.template}" WITH (FORCE)')

    @contextlib.contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """The URL of a fresh database with our tables, or an empty one; dropped afterwards."""
        name = f"{self.template}_{secrets.token_hex(4)}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{self.template if migrated else "template0"}"')
        try:
            yield _render(self.server.set(database=name))
        finally:
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def redis_database(self) -> str:
        """The URL of an empty Redis database."""
        url = f"{self.redis_url.rpartition('/')[0]}/{next(self._redis_databases)}"
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            client.flushdb()
        return url

    def _execute(self, statement: str) -> None:
        engine = create_engine(self.server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))


def _render(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@contextlib.contextmanager
def running_services(directory: Path) -> Iterator[Services]:
    """The servers for one test run; `directory` is for the embedded ones."""
    database_url = os.environ.get("PAGEMILL_TEST_DATABASE_URL")
    redis_url = os.environ.get("PAGEMILL_TEST_REDIS_URL")
    with contextlib.ExitStack() as stack:
        if database_url is None or redis_url is None:
            embedded = stack.enter_context(
                embedded_services(
                    DataDir(directory),
                    stack.enter_context(contextlib.closing(ChildLog(directory / "logs"))),
                    postgres=database_url is None,
                    valkey=redis_url is None,
                    durable=False,
                )
            )
            database_url = database_url or embedded.database_url
            redis_url = redis_url or embedded.redis_url
        assert database_url is not None
        assert redis_url is not None
        services = Services(sqlalchemy_url(database_url), redis_url)
        services.create_template()
        stack.callback(services.drop_template)
        yield services
