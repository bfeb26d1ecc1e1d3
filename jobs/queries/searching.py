"""Jobs by a query of `jobs.search`. Each term is a column of `jobs`, or a look by an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import InvalidInput
from jobs.ids import JOB_PREFIX
from jobs.queries.reading import Job, job_of
from jobs.search import METADATA, Term, Value
from jobs.states import JobState

MOST_COUNTED = 10_000
AT_RISK = "1h"  # `deadline:risk` is an open job whose deadline is nearer than this

_RUNNING = "j.id IN (SELECT job_id FROM requests WHERE state = 'running')"
OPEN = "j.ended_at IS NULL"
STATUS = {
    "open": OPEN,
    "running": f"({OPEN} AND {_RUNNING})",
    "waiting": f"({OPEN} AND j.state = 'in_progress' AND j.paused_at IS NULL AND NOT {_RUNNING})",
    "paused": f"({OPEN} AND j.paused_at IS NOT NULL)",
} | {str(state): f"j.state = '{state}'" for state in JobState}
_NUMBERS = {
    "priority": "j.priority",
    "lines": "j.total",
    "failed": "j.failed",
    "tokens": "(j.prompt_tokens + j.completion_tokens)",
}
VISIBLE = """
    j.in_progress_at IS NOT NULL AND j.deleted_at IS NULL AND NOT j.is_live
    AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id)
"""


@dataclass
class Conditions:
    """SQL, and the values that it binds. Nothing that a caller wrote gets into the SQL itself."""

    parameters: dict[str, object] = field(default_factory=dict)

    def bind(self, value: object) -> str:
        name = f"v{len(self.parameters)}"
        self.parameters[name] = value
        return f":{name}"

    def of(self, terms: Sequence[Term]) -> str:
        return " AND ".join(["true", *map(self._term, terms)])

    def _term(self, term: Term) -> str:
        either = " OR ".join(self._value(term.field, value) for value in term.values)
        # A comparison with NULL is no match, and its negation is one. What is not negated stands as it is, because an
        # index serves no condition inside of a call.
        return f"({either}) IS NOT TRUE" if term.is_negated else f"({either})"

    def _value(self, name: str | None, value: Value) -> str:
        if name in _NUMBERS:
            return f"{_NUMBERS[name]} {value.comparison or '='} CAST({self.bind(value.number(name))} AS numeric)"
        if name in ("created", "ended"):
            # `>2h` is younger than two hours: later than two hours ago.
            ago = f"clock_timestamp() - make_interval(secs => {self.bind(value.seconds(name))})"
            return f"j.{name}_at {value.comparison} {ago}"
        if name == "deadline" and value == Value("risk"):
            value = Value(AT_RISK, "<")
        if name == "deadline":
            ahead = f"clock_timestamp() + make_interval(secs => {self.bind(value.seconds(name))})"
            return f"({OPEN} AND j.expires_at {value.comparison} {ahead})"
        if value.comparison:
            raise InvalidInput(f"{name or 'a word'} takes no comparison", param="q")
        match name:
            case "status":
                if value.text not in STATUS:
                    raise InvalidInput(f"status: one of {', '.join(STATUS)} is expected", param="q")
                return STATUS[value.text]
            case "model":
                return f"j.model = {self.bind(value.text)}"
            case "tenant":
                return f"j.tenant_id IN (SELECT id FROM tenants WHERE name = {self.bind(value.text)})"
            case "id":
                return self._id(value.text)
            case "name":
                return self._name(value.text)
            case "code":
                code = self.bind(value.text)
                return f"EXISTS (SELECT FROM failure_groups g WHERE g.job_id = j.id AND g.code = {code})"
            case None:
                return f"({self._name(value.text)} OR {self._id(value.text)})"
        key = self.bind(name.removeprefix(METADATA))
        return f"j.metadata ->> CAST({key} AS text) = {self.bind(value.text)}"

    def _name(self, beginning: str) -> str:
        return f"coalesce(starts_with(lower(j.name), lower({self.bind(beginning)})), false)"

    def _id(self, beginning: str) -> str:
        digits = beginning.removeprefix(JOB_PREFIX).lower()
        if not digits or len(digits) > 32 or not set(digits) <= set("0123456789abcdef"):
            return "false"
        first, last = (self.bind(UUID(hex=digits.ljust(32, filler))) for filler in "0f")
        return f"j.id BETWEEN {first} AND {last}"


def search_jobs(
    connection: Connection, tenant_id: UUID | None, terms: Sequence[Term], *, after: UUID | None, limit: int
) -> list[Job]:
    """Published jobs of a tenant, or of all, that match every term; newest first, after the id `after`."""
    conditions = Conditions()
    where = conditions.of(terms)
    # Ids are ordered by time, so the id is the cursor, and the index gives their order.
    rows = connection.execute(
        text(f"""
            SELECT j.id, j.tenant_id, j.state, j.model, j.priority, j.metadata, j.completion_window,
                   j.total, j.completed, j.failed, j.cancelled, j.expired, j.last_seq,
                   j.prompt_tokens, j.cached_tokens, j.completion_tokens, j.created_at, j.in_progress_at,
                   j.expires_at, j.cancelling_at, j.ended_at, j.name, j.paused_at, j.retry_of
            FROM jobs j
            WHERE {VISIBLE} AND {where} AND (CAST(:after AS uuid) IS NULL OR j.id < :after)
            ORDER BY j.id DESC
            LIMIT :limit
        """),
        {"tenant_id": tenant_id, "after": after, "limit": limit, **conditions.parameters},
    )
    return [job_of(row) for row in rows]


def newer_jobs(
    connection: Connection, tenant_id: UUID | None, terms: Sequence[Term], than: UUID, *, limit: int
) -> list[UUID]:
    """Ids of published jobs that match and are newer than the one with the id `than`; newest first."""
    conditions = Conditions()
    where = conditions.of(terms)
    # Ids are ordered by time: these are at the end of the index.
    rows = connection.execute(
        text(f"SELECT j.id FROM jobs j WHERE {VISIBLE} AND {where} AND j.id > :than ORDER BY j.id DESC LIMIT :limit"),
        {"tenant_id": tenant_id, "than": than, "limit": limit, **conditions.parameters},
    )
    return list(rows.scalars())


def count_jobs(
    connection: Connection, tenant_id: UUID | None, searches: Mapping[str, Sequence[Term]]
) -> dict[str, int]:
    """How many jobs match each search, up to `MOST_COUNTED`."""
    conditions = Conditions()
    # Bounded, because a count reads every job that it counts; one statement, so that all counts are of one moment.
    counts = ", ".join(
        f"""(SELECT count(*) FROM (SELECT FROM jobs j WHERE {VISIBLE} AND {conditions.of(terms)} LIMIT :limit) c)
            AS {name}"""
        for name, terms in searches.items()
    )
    row = connection.execute(
        text(f"SELECT {counts}"), {"tenant_id": tenant_id, "limit": MOST_COUNTED, **conditions.parameters}
    ).one()
    return dict(row._mapping)
