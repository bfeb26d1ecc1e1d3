"""How many rows a connection has read, and statistics to plan by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import Connection, text

from tests.support.rows import Rows


def analyze(rows: Rows) -> None:
    """Let Postgres plan by what is there now."""
    with rows.database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def rows_read(connection: Connection, tables: Sequence[str]) -> Counter[str]:
    """Rows of `tables` that this transaction has read, by how it came to them."""
    found = connection.execute(
        text("SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = ANY(:tables)"),
        {"tables": list(tables)},
    )
    counts: Counter[str] = Counter()
    for row in found:
        counts[f"{row.relname} by scanning"] = row.seq_tup_read
        counts[f"{row.relname} by index"] = row.idx_tup_fetch or 0
    return counts
