"""Workers take requests: jobs are chosen first, by priority, fair share between tenants and age, then rows in them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.database import BINARY_RESULTS
from jobs.errors import LeaseLost
from jobs.queries.planner import force_index_scans, row_of
from jobs.queries.settling import ClaimToken, lock_jobs

# Of one tenant and priority, only its oldest jobs are looked at in one claim: ten thousand small jobs cost no more.
JOBS_PER_TENANT = 32
MANY_DEATHS = 2**15 - 1  # more than the column can count


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """A request that the worker `holder` holds, under `epoch`."""

    job_id: UUID
    line: int
    epoch: int
    holder: UUID
    tenant_id: UUID
    priority: int
    body: bytes

    @property
    def name(self) -> str:
        """Unlike any other claim's, of this or another request."""
        return f"{self.job_id.hex}-{self.line}-{self.epoch}"

    @property
    def hold(self) -> ClaimToken:
        return ClaimToken(self.job_id, self.line, self.epoch, self.holder)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim came to. `wants_idle`: a request waits that must run alone, and this worker is not idle yet."""

    requests: tuple[ClaimedRequest, ...]
    is_solo: bool = False
    wants_idle: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job with requests that wait: `waiting` of them, or a few less where other workers claim or settle meanwhile."""

    job_id: UUID
    tenant_id: UUID
    priority: int
    waiting: int


def claim(
    connection: Connection, worker_id: UUID, model: str, *, limit: int, is_idle: bool, solo_after_deaths: int
) -> Claim:
    """Take up to `limit` requests of a model. Raises `LeaseLost` where this worker may not claim any more.

    A request that was running in `solo_after_deaths` deaths of a worker is taken alone, by a worker that is idle.
    """
    force_index_scans(connection)
    # Held until commit: no reaper can end this worker between the check and the rows, and leave them without an owner.
    alive = connection.execute(
        text(
            "SELECT 1 FROM workers WHERE id = :id AND ended_at IS NULL AND lease_expires_at > clock_timestamp() "
            "FOR KEY SHARE"
        ),
        {"id": worker_id},
    ).scalar()
    if alive is None:
        raise LeaseLost("The worker's lease is over.")
    suspect = _suspect_job(connection, model, solo_after_deaths)
    if suspect is not None:
        if not is_idle:
            return Claim((), wants_idle=True)
        alone = _take(connection, worker_id, {suspect: 1}, deaths=(solo_after_deaths, MANY_DEATHS))
        if alone:
            return Claim(alone, is_solo=True)
    candidates, running = _candidates(connection, model, solo_after_deaths)
    quotas = share(limit, candidates, running)
    return Claim(_take(connection, worker_id, quotas, deaths=(0, solo_after_deaths)))


def share(limit: int, candidates: Sequence[Candidate], running: Mapping[UUID, int]) -> dict[UUID, int]:
    """Divide `limit` places among jobs: `{job_id: places}`.

    A higher priority is served whole before a lower one. Within one, each place goes to the tenant that has the fewest
    running, those given here included; within a tenant, to its jobs in the order of `candidates`.
    """
    places: dict[UUID, int] = {}
    have = dict(running)
    for priority in sorted({candidate.priority for candidate in candidates}, reverse=True):
        queues: dict[UUID, deque[Candidate]] = defaultdict(deque)
        for candidate in candidates:
            if candidate.priority == priority:
                queues[candidate.tenant_id].append(candidate)
        given = _poorest_first(
            limit, [(have.get(tenant, 0), sum(job.waiting for job in queue)) for tenant, queue in queues.items()]
        )
        for (tenant, queue), count in zip(queues.items(), given, strict=True):
            have[tenant] = have.get(tenant, 0) + count
            limit -= count
            while count > 0:
                job = queue.popleft()
                places[job.job_id] = min(count, job.waiting)
                count -= places[job.job_id]
    return places


def _poorest_first(limit: int, tenants: Sequence[tuple[int, int]]) -> list[int]:
    """How many of `limit` places go to each tenant, who has `(running, waiting)` requests. Equals take turns."""
    given = [0] * len(tenants)
    poorest = [(running, turn) for turn, (running, waiting) in enumerate(tenants) if waiting > 0]
    heapify(poorest)
    while limit > 0 and poorest:
        running, turn = poorest[0]
        given[turn] += 1
        limit -= 1
        if given[turn] == tenants[turn][1]:
            heappop(poorest)
        else:
            heapreplace(poorest, (running + 1, turn))
    return given


def claims_of(connection: Connection, worker_id: UUID) -> set[ClaimToken]:
    """What a worker holds: whatever else it computes was cancelled, expired or freed."""
    rows = connection.execute(
        text("SELECT job_id, line, epoch FROM requests WHERE worker_id = :id AND state = 'running'"), {"id": worker_id}
    )
    return {ClaimToken(row.job_id, row.line, row.epoch, worker_id) for row in rows}


def give_back(connection: Connection, held: Collection[ClaimToken]) -> int:
    """Put requests back in line, uncharged: claimed, but not to be run here. Returns how many still were ours."""
    force_index_scans(connection)
    lock_jobs(connection, {request.job_id for request in held})
    # Only what is still held as it was claimed.
    return connection.execute(
        text(
            "UPDATE requests r SET state = 'pending', worker_id = NULL "
            "FROM unnest(CAST(:job_ids AS uuid[]), CAST(:lines AS int[]), CAST(:epochs AS int[]), "
            "            CAST(:holders AS uuid[])) AS h (job_id, line, epoch, holder) "
            f"CROSS JOIN LATERAL {row_of('h')} "
            "WHERE r.ctid = found.row AND r.epoch = h.epoch AND r.worker_id = h.holder AND r.state = 'running'"
        ),
        {
            "job_ids": [request.job_id for request in held],
            "lines": [request.line for request in held],
            "epochs": [request.epoch for request in held],
            "holders": [request.holder for request in held],
        },
    ).rowcount


_CLAIMABLE = (
    "j.model = :model AND j.state = 'in_progress' AND j.ended_at IS NULL "
    "AND (j.expires_at IS NULL OR j.expires_at > clock_timestamp())"
)


def _candidates(
    connection: Connection, model: str, solo_after_deaths: int
) -> tuple[list[Candidate], Mapping[UUID, int]]:
    """The jobs to choose from, in the order of priority and age, and how many requests each tenant has running."""
    # Counting what waits would read hundreds of rows in each job; how many are open stands on the job's row. OFFSET 0
    # keeps EXISTS a look at one row of each job: as a join, statistics of a small table make it read all that waits.
    jobs = connection.execute(
        text(
            "SELECT j.id, j.tenant_id, j.priority, j.open FROM ( "
            "  SELECT id, tenant_id, priority, total - last_seq AS open, "
            "         row_number() OVER (PARTITION BY tenant_id, priority ORDER BY id) AS place FROM jobs j "
            f"  WHERE {_CLAIMABLE} AND EXISTS (SELECT 1 FROM requests r WHERE r.job_id = j.id AND r.state = 'pending' "
            "    AND r.deaths < :solo_after_deaths OFFSET 0) "
            ") j WHERE j.place <= :jobs ORDER BY j.priority DESC, j.id"
        ),
        {"model": model, "jobs": JOBS_PER_TENANT, "solo_after_deaths": solo_after_deaths},
    ).all()
    if not jobs:
        return [], {}
    # Few rows run at a time, as many as the engines hold; OFFSET 0 has them read by the index of those alone. What is
    # claimed between the two statements counts as running.
    rows = connection.execute(
        text(
            "SELECT r.job_id, j.tenant_id, count(*) AS requests FROM ( "
            "  SELECT job_id FROM requests WHERE state = 'running' OFFSET 0 "
            ") r JOIN jobs j ON j.id = r.job_id GROUP BY r.job_id, j.tenant_id"
        )
    ).all()
    running_by_job = {row.job_id: row.requests for row in rows}
    running_by_tenant: dict[UUID, int] = defaultdict(int)
    for row in rows:
        running_by_tenant[row.tenant_id] += row.requests
    candidates = (
        Candidate(job.id, job.tenant_id, job.priority, job.open - running_by_job.get(job.id, 0)) for job in jobs
    )
    return [candidate for candidate in candidates if candidate.waiting > 0], running_by_tenant


def _suspect_job(connection: Connection, model: str, solo_after_deaths: int) -> UUID | None:
    # A partial index holds the few requests that ever saw a worker die.
    suspect: UUID | None = connection.execute(
        text(
            "SELECT r.job_id FROM requests r JOIN jobs j ON j.id = r.job_id "
            f"WHERE r.state = 'pending' AND r.deaths > 0 AND r.deaths >= :solo_after_deaths AND {_CLAIMABLE} "
            "ORDER BY r.job_id LIMIT 1"
        ),
        {"model": model, "solo_after_deaths": solo_after_deaths},
    ).scalar()
    return suspect


def _take(
    connection: Connection, worker_id: UUID, places: Mapping[UUID, int], *, deaths: tuple[int, int]
) -> tuple[ClaimedRequest, ...]:
    if not places:
        return ()
    # In prefix order, so that prompts which begin alike meet in one engine; rows that another claim holds are skipped.
    # Each is found again where it was locked. A body is looked up by its whole key, in whose index alone lines are in
    # order: by the statistics of jobs of one line another would do.
    rows = connection.execute(
        text(
            "WITH quota AS ( "
            "  SELECT * FROM unnest(CAST(:job_ids AS uuid[]), CAST(:places AS int[])) AS q (job_id, places) "
            "), picked AS MATERIALIZED ( "
            "  SELECT p.row FROM quota q CROSS JOIN LATERAL ( "
            "    SELECT r.ctid AS row FROM requests r WHERE r.job_id = q.job_id AND r.state = 'pending' "
            "      AND r.deaths >= :fewest AND r.deaths < :most ORDER BY r.prefix, r.line LIMIT q.places "
            "    FOR UPDATE SKIP LOCKED) p "
            "), taken AS ( "
            "  UPDATE requests r SET state = 'running', worker_id = :worker_id, epoch = r.epoch + 1 FROM picked p "
            "  WHERE r.ctid = p.row "
            "  RETURNING r.job_id, r.line, r.epoch, r.prefix "
            ") SELECT t.job_id, t.line, t.epoch, j.tenant_id, j.priority, b.body "
            "FROM taken t JOIN jobs j ON j.id = t.job_id CROSS JOIN LATERAL ( "
            "  SELECT body FROM bodies b WHERE b.job_id = t.job_id AND b.line BETWEEN t.line AND t.line "
            "  ORDER BY b.line LIMIT 1) b "
            "ORDER BY j.priority DESC, t.job_id, t.prefix, t.line"
        ),
        {
            "worker_id": worker_id,
            "job_ids": list(places),
            "places": list(places.values()),
            "fewest": deaths[0],
            "most": deaths[1],
        },
        execution_options=BINARY_RESULTS,
    )
    return tuple(
        ClaimedRequest(job_id, line, epoch, worker_id, tenant_id, priority, body)
        for job_id, line, epoch, tenant_id, priority, body in rows
    )
