"""Plans that do not depend on statistics (docs/decisions/0010)."""

from __future__ import annotations

from sqlalchemy import Connection, text


def force_index_scans(connection: Connection) -> None:
    """Until the transaction ends, make Postgres read indexes in their order and stop at LIMIT.

    A plan that cannot avoid a disabled node looks expensive to Postgres before 18, which would then compile it: JIT is
    off, too.
    """
    # SET LOCAL of six switches in one round trip.
    connection.execute(
        text("""
            SELECT set_config('enable_seqscan', 'off', true),
                   set_config('enable_bitmapscan', 'off', true),
                   set_config('enable_hashjoin', 'off', true),
                   set_config('enable_mergejoin', 'off', true),
                   set_config('enable_sort', 'off', true),
                   set_config('jit', 'off', true)
        """)
    )


def avoid_scans(connection: Connection) -> None:
    """Until the transaction ends, make Postgres read through an index where there is one, and join and sort at will.

    For reads of what is kept by time: where statistics are missing or old, a range of minutes looks like a third of
    the table.
    """
    # SET LOCAL of two switches in one round trip.
    connection.execute(
        text("SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)")
    )
