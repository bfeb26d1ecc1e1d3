"""Many jobs at once: those of a search, or of ids, that an action can be done to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries.searching import MOST_COUNTED, VISIBLE, Conditions
from jobs.search import Term

LARGEST = 3


class Action(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    PRIORITY = "priority"
    RETRY = "retry"
    CANCEL = "cancel"
    DELETE = "delete"


_RUNS = "j.state = 'in_progress'"
_APPLIES = {
    Action.PAUSE: f"{_RUNS} AND j.paused_at IS NULL",
    Action.RESUME: f"{_RUNS} AND j.paused_at IS NOT NULL",
    Action.PRIORITY: _RUNS,
    Action.RETRY: "j.failed > 0",
    Action.CANCEL: _RUNS,
    Action.DELETE: "j.ended_at IS NOT NULL",
}
_AT_STAKE = {Action.RETRY: "j.failed", Action.DELETE: "j.total"}
_OPEN_LINES = "(j.total - j.last_seq)"


@dataclass(frozen=True, slots=True)
class Selection:
    """Jobs of a tenant, or of all, that match every term; with `ids`, those of them alone."""

    tenant_id: UUID | None
    terms: Sequence[Term]
    ids: Collection[UUID] | None = None

    def condition(self, action: Action) -> tuple[str, dict[str, object]]:
        """SQL and what it binds, for those of the jobs that the action can be done to."""
        conditions = Conditions()
        where = f"{VISIBLE} AND {conditions.of(self.terms)} AND {_APPLIES[action]}"
        where += " AND (CAST(:ids AS uuid[]) IS NULL OR j.id = ANY(CAST(:ids AS uuid[])))"
        ids = None if self.ids is None else list(self.ids)
        return where, {"tenant_id": self.tenant_id, "ids": ids, **conditions.parameters}


@dataclass(frozen=True, slots=True)
class LargeJob:
    id: UUID
    name: str | None
    lines: int


@dataclass(frozen=True, slots=True)
class Stake:
    """How many jobs and lines an action would touch, counted up to `MOST_COUNTED` jobs, and the largest of them."""

    jobs: int
    lines: int
    largest: Sequence[LargeJob]


@dataclass(frozen=True, slots=True)
class Target:
    id: UUID
    tenant_id: UUID


def read_stake(connection: Connection, selection: Selection, action: Action) -> Stake:
    """What is at stake: open lines; of a retry the failed ones, of a deletion all."""
    where, parameters = selection.condition(action)
    # Bounded as counts are.
    rows = connection.execute(
        text(f"""
            SELECT *, count(*) OVER () AS jobs, sum(lines) OVER () AS all_lines
            FROM (SELECT j.id, j.name, {_AT_STAKE.get(action, _OPEN_LINES)} AS lines FROM jobs j
                  WHERE {where} LIMIT :counted) m
            ORDER BY lines DESC, id LIMIT :largest
        """),
        {**parameters, "counted": MOST_COUNTED, "largest": LARGEST},
    ).all()
    if not rows:
        return Stake(0, 0, ())
    return Stake(rows[0].jobs, int(rows[0].all_lines), [LargeJob(row.id, row.name, row.lines) for row in rows])


def find_targets(
    connection: Connection, selection: Selection, action: Action, *, after: UUID | None, limit: int
) -> list[Target]:
    """The next jobs to do it to, newest first, so that jobs which come in later are none of them."""
    where, parameters = selection.condition(action)
    # Ids are ordered by time, and the index gives their order.
    rows = connection.execute(
        text(f"""
            SELECT j.id, j.tenant_id FROM jobs j
            WHERE {where} AND (CAST(:after AS uuid) IS NULL OR j.id < :after)
            ORDER BY j.id DESC LIMIT :limit
        """),
        {**parameters, "after": after, "limit": limit},
    )
    return [Target(row.id, row.tenant_id) for row in rows]
