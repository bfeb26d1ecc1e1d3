"""Values of the newest jobs, to complete a search that is being typed."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries.searching import STATUS, VISIBLE
from jobs.search import METADATA

NEWEST = 2000  # jobs that are looked at
MOST = 9

_VALUES = {
    "model": "SELECT model AS value FROM newest j",
    "name": "SELECT name AS value FROM newest j",
    "priority": "SELECT priority::text AS value FROM newest j",
    "tenant": "SELECT t.name AS value FROM newest j JOIN tenants t ON t.id = j.tenant_id",
    "code": "SELECT DISTINCT g.code AS value, g.job_id FROM newest j JOIN failure_groups g ON g.job_id = j.id",
    METADATA: "SELECT jsonb_object_keys(metadata) AS value FROM newest j",
}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A value, and how many of the newest jobs have it."""

    value: str
    jobs: int


def suggest(connection: Connection, tenant_id: UUID | None, field: str, prefix: str) -> list[Suggestion]:
    """Values of a field of `jobs.search` that begin like this, the most frequent first; none of a field of figures.

    Of `metadata.` the keys, of `metadata.KEY` its values.
    """
    if field == "status":
        return _states(connection, tenant_id, prefix)
    values = _VALUES.get(field)
    if values is None and field.startswith(METADATA):
        values = "SELECT metadata ->> CAST(:key AS text) AS value FROM newest j"
    if values is None:
        return []
    # The newest jobs by the end of the index; what else is read is read of these alone.
    rows = connection.execute(
        text(f"""
            WITH newest AS MATERIALIZED (
                SELECT j.id, j.tenant_id, j.model, j.name, j.priority, j.metadata FROM jobs j
                WHERE {VISIBLE} ORDER BY j.id DESC LIMIT :newest
            )
            SELECT value, count(*) AS jobs FROM ({values}) v
            WHERE value <> '' AND starts_with(lower(value), lower(:prefix))
            GROUP BY value ORDER BY jobs DESC, value LIMIT :most
        """),
        {
            "tenant_id": tenant_id,
            "newest": NEWEST,
            "prefix": prefix,
            "most": MOST,
            "key": field.removeprefix(METADATA),
        },
    )
    return [Suggestion(row.value, row.jobs) for row in rows]


def _states(connection: Connection, tenant_id: UUID | None, prefix: str) -> list[Suggestion]:
    """States that a search knows, those that no job is in included: they are few, and worth knowing."""
    names = [name for name in STATUS if name.startswith(prefix.lower())]
    if not names:
        return []
    counts = ", ".join(f'count(*) FILTER (WHERE {STATUS[name]}) AS "{name}"' for name in names)
    # The same jobs as above.
    row = connection.execute(
        text(f"""
            SELECT {counts}
            FROM (SELECT * FROM jobs j WHERE {VISIBLE} ORDER BY j.id DESC LIMIT :newest) j
        """),
        {"tenant_id": tenant_id, "newest": NEWEST},
    ).one()
    found = [Suggestion(name, row._mapping[name]) for name in names]
    return sorted(found, key=lambda suggestion: -suggestion.jobs)[:MOST]
