"""Keys, straight in the database: who may run this may do anything anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from cli.commands.terminal import err, out, reports_errors, show_json
from cli.first_key import store_key
from cli.running import with_running
from jobs import keys
from jobs.database import DatabaseNotConfigured, connect
from jobs.queries import tenants
from jobs.roles import Role
from jobs.settings import Settings


@reports_errors
def create(*, tenant: str, name: str, role: Role, as_json: bool = False) -> int:
    settings = with_running(Settings())
    if settings.database_url is None:
        raise DatabaseNotConfigured
    key = keys.new_key()
    stored = store_key(settings, settings.database_url, key, tenant=tenant, name=name, role=role)
    if as_json:
        show_json({"key": key, "tenant": tenant, "name": name, "role": role, "webhook_secret": stored.webhook_secret})
        return 0
    out.print(key)
    err.print("It is shown only now; the database has no more than a hash of it.", style="dim")
    if stored.webhook_secret is not None:
        err.print(f"{tenant}'s webhooks are signed with {stored.webhook_secret}", style="dim", markup=False)
    return 0


@reports_errors
def list_all(*, as_json: bool = False) -> int:
    with _transaction() as connection:
        listed = tenants.list_keys(connection)
    if as_json:
        for key in listed:
            show_json(asdict(key))
        return 0
    table = Table("key", "tenant", "name", "role", "created", "last used", "state")
    for key in listed:
        used = "-" if key.last_used_at is None else f"{key.last_used_at:%F %R}"
        state = "live" if key.revoked_at is None else f"revoked {key.revoked_at:%F}"
        table.add_row(
            key.hint + "…", Text(key.tenant), Text(key.name), key.role, f"{key.created_at:%F %R}", used, state
        )
    out.print(table)
    return 0


@reports_errors
def revoke(hint: str, *, as_json: bool = False) -> int:
    with _transaction() as connection:
        revoked = tenants.revoke_key(connection, hint.rstrip("…"))  # the whole key will do too
    if as_json:
        show_json({"revoked": revoked})
    else:
        out.print(f"{revoked} revoked")
    if not revoked:
        err.print("Give the beginning of a live key, as `pagemill keys list` shows it.", style="red")
        return 2
    return 0


@contextlib.contextmanager
def _transaction() -> Iterator[Connection]:
    database = connect(with_running(Settings()), "pagemill keys")
    try:
        with database.begin() as connection:
            yield connection
    finally:
        database.dispose()
