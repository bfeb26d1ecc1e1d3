"""Do the migrations make the tables that `jobs.tables` declares? `python -m cli.schema_check`, part of `make check`.

Alembic's own comparison does not see check constraints, partial indexes' conditions or storage options. So both are
made for real, each in a scratch database, and what Postgres itself says of them is compared. Compression is left out:
lz4 is used where the server was built with it.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from cli.child_logs import ChildLog
from cli.data_dir import DataDir, DataDirError
from cli.embedded import EmbeddedServiceError, embedded_services
from cli.supervisor import ChildFailed
from jobs.database import sqlalchemy_url
from jobs.settings import Settings
from jobs.tables import metadata
from migrations.run import upgrade

Schema = Mapping[str, str]
"""What there is, such as "column jobs.id", and how Postgres defines it."""

# pg_catalog, in Postgres' own spelling: https://www.postgresql.org/docs/current/catalogs.html
_OURS = "n.nspname = 'public' AND t.relname <> 'alembic_version'"
_TABLES = f"""
    SELECT 'relation ' || t.relname AS name,
           concat_ws(' ', t.relkind::text, t.relpersistence::text, t.reloptions::text) AS definition
    FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE t.relkind IN ('r', 'p', 'v', 'm', 'f') AND {_OURS}
"""
_COLUMNS = f"""
    SELECT 'column ' || t.relname || '.' || a.attname AS name,
           concat_ws(' ', format_type(a.atttypid, a.atttypmod),
                     CASE WHEN a.attnotnull THEN 'NOT NULL' END,
                     'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid),
                     'IDENTITY ' || nullif(a.attidentity::text, ''),
                     'GENERATED ' || nullif(a.attgenerated::text, ''),
                     'COLLATE ' || c.collname) AS definition
    FROM pg_attribute a
    JOIN pg_class t ON t.oid = a.attrelid
    JOIN pg_namespace n ON n.oid = t.relnamespace
    LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
    LEFT JOIN pg_collation c ON c.oid = a.attcollation
    WHERE t.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped AND {_OURS}
"""
_CONSTRAINTS = f"""
    SELECT 'constraint ' || t.relname || '.' || k.conname AS name, pg_get_constraintdef(k.oid) AS definition
    FROM pg_constraint k
    JOIN pg_class t ON t.oid = k.conrelid
    JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE {_OURS}
"""
_INDEXES = f"""
    SELECT 'index ' || i.relname AS name, pg_get_indexdef(x.indexrelid) AS definition
    FROM pg_index x
    JOIN pg_class i ON i.oid = x.indexrelid
    JOIN pg_class t ON t.oid = x.indrelid
    JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE {_OURS}
"""


def read_schema(connection: Connection) -> Schema:
    """Tables, columns, constraints and indexes of a database, Alembic's own table aside."""
    return {
        row.name: row.definition
        for query in (_TABLES, _COLUMNS, _CONSTRAINTS, _INDEXES)
        for row in connection.execute(text(query))
    }


def differences(migrated: Schema, declared: Schema) -> list[str]:
    """A sentence for each thing that is not the same in both."""
    sentences = []
    for name in sorted(migrated.keys() | declared.keys()):
        made, meant = migrated.get(name), declared.get(name)
        if made is None:
            sentences.append(f"{name} is declared but no migration makes it: {meant}")
        elif meant is None:
            sentences.append(f"{name} is made by the migrations but not declared: {made}")
        elif made != meant:
            sentences.append(f"{name} differs\n    migrations: {made}\n    tables:     {meant}")
    return sentences


def compare(server_url: str) -> list[str]:
    """Make both schemas on a server whose user may create databases, compare them, and leave nothing behind."""
    with _scratch_database(server_url) as url:
        upgrade(url)
        with _engine(sqlalchemy_url(url)).connect() as connection:
            migrated = read_schema(connection)
    with _scratch_database(server_url) as url, _engine(sqlalchemy_url(url)).begin() as connection:
        metadata.create_all(connection)
        return differences(migrated, read_schema(connection))


@contextlib.contextmanager
def _scratch_database(server_url: str) -> Iterator[str]:
    server = sqlalchemy_url(server_url)
    name = f"pagemill_schema_check_{secrets.token_hex(4)}"
    administration = _engine(server).execution_options(isolation_level="AUTOCOMMIT")
    with administration.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}" TEMPLATE template0'))
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))


def _engine(url: URL) -> Engine:
    return create_engine(url, poolclass=NullPool)


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """PAGEMILL_DATABASE_URL's server, or one that lives for this check."""
    given = Settings().database_url
    if given is not None:
        yield given
        return
    with (
        tempfile.TemporaryDirectory(prefix="pagemill-schema-check-") as directory,
        contextlib.closing(ChildLog(None)) as log,
        embedded_services(DataDir(Path(directory)), log, valkey=False, durable=False) as services,
    ):
        assert services.database_url is not None
        yield services.database_url


def main() -> int:
    try:
        with _server() as server_url:
            found = compare(server_url)
    except (ChildFailed, DataDirError, EmbeddedServiceError) as error:
        print(error, file=sys.stderr)
        return 2
    if found:
        print("The migrations do not make what jobs/tables declares:", *found, sep="\n  ", file=sys.stderr)
        return 1
    print("The migrations make what jobs/tables declares.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
