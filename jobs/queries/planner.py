"""Plans that do not depend on statistics."""

from __future__ import annotations

from sqlalchemy import Connection, text


def force_index_scans(connection: Connection) -> None:
    """Until the transaction ends, have Postgres walk indexes in their order and stop at LIMIT.

    A job of a million lines is a minute old before autovacuum first counts it, and one among ten thousand small jobs
    looks small for ever. Believing that, the planner would read and sort all that waits for each claim of a few hundred
    (measured with 200,000 lines: 360 ms), or read the whole table for each group of results.
    """
    # A plan that cannot do without what is off looks dear to Postgres before 18, as if compiling it paid: hence no JIT.
    connection.execute(
        text(
            "SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true), "
            "       set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true), "
            "       set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"
        )
    )


def row_of(key: str) -> str:
    """For `CROSS JOIN LATERAL`: where the request `key.job_id`, `key.line` is stored, as `found.row`.

    An UPDATE joined by the primary key may as well read the whole index, and look up its few keys in that: believing
    that a table is small, Postgres does. By OFFSET 0 and `ctid` it has no choice. Whoever updates by `found.row` must
    not mind that a row which another transaction changes meanwhile is passed over.
    """
    return (
        f"(SELECT q.ctid AS row FROM requests q WHERE q.job_id = {key}.job_id AND q.line = {key}.line OFFSET 0) found"
    )
