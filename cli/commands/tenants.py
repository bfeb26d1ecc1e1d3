"""Tenants and their weights, straight in the database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from cli.commands.terminal import err, out, reports_errors, show_json
from cli.running import with_running
from jobs.database import connect
from jobs.queries import tenants
from jobs.settings import Settings


@reports_errors
def list_all(*, as_json: bool = False) -> int:
    with _transaction() as connection:
        listed = tenants.list_weights(connection)
    if as_json:
        for tenant in listed:
            show_json({"tenant": tenant.name, "weight": tenant.weight})
        return 0
    table = Table("tenant", "weight")
    for tenant in listed:
        table.add_row(Text(tenant.name), str(tenant.weight))
    out.print(table)
    return 0


@reports_errors
def set_weight(name: str, weight: int) -> int:
    with _transaction() as connection:
        is_known = tenants.set_weight(connection, name, weight)
    if not is_known:
        err.print("There is no tenant of that name; `pagemill tenants list` shows them.", style="red")
        return 2
    return 0


@contextlib.contextmanager
def _transaction() -> Iterator[Connection]:
    database = connect(with_running(Settings()), "pagemill tenants")
    try:
        with database.begin() as connection:
            yield connection
    finally:
        database.dispose()
