"""Claims: divide places between tenants by weight, then between a tenant's jobs by priority and age; then lock rows."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.database import BINARY_RESULTS
from jobs.errors import LeaseLost
from jobs.queries import job_events, line_events, waits
from jobs.queries.line_events import LineEvent
from jobs.queries.planner import force_index_scans
from jobs.queries.settling import ClaimToken, lock_jobs

# A claim considers only the first jobs of each tenant: ten thousand small ones cost no more than these.
JOBS_PER_TENANT = 32
MANY_DEATHS = 2**15 - 1  # the largest value of the column


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """A request as the worker `holder` claimed it, under `epoch`."""

    job_id: UUID
    line: int
    epoch: int
    holder: UUID
    tenant_id: UUID
    body: bytes
    is_live: bool = False

    @property
    def name(self) -> str:
        """Unique to this claim: a later claim of the same request has another epoch."""
        return f"{self.job_id.hex}-{self.line}-{self.epoch}"

    @property
    def token(self) -> ClaimToken:
        """The fencing token of this claim."""
        return ClaimToken(self.job_id, self.line, self.epoch, self.holder)


@dataclass(frozen=True, slots=True)
class Claim:
    """The result of a claim.

    `is_solo`: the one request must run alone. `wants_idle`: such a request waits, and this worker is not idle yet.
    `is_cut`: it ended at its limit of bytes, and more may be pending. `first_of`: jobs of which nothing was taken
    before.
    """

    requests: tuple[ClaimedRequest, ...]
    is_solo: bool = False
    wants_idle: bool = False
    is_cut: bool = False
    first_of: Collection[UUID] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job with `waiting` pending requests; concurrent claims and settlements may have taken a few of them.

    `is_fresh`: no line of it was settled yet, and none runs.
    """

    job_id: UUID
    tenant_id: UUID
    waiting: int
    is_live: bool = False
    is_fresh: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Queue:
    """A model's jobs to choose from, ordered by priority and age; each tenant's running requests and weight."""

    candidates: Sequence[Candidate]
    running: Mapping[UUID, int]
    weights: Mapping[UUID, int]
    running_jobs: Mapping[UUID, int] = field(default_factory=dict)
    """Running requests of each job, of whichever model."""

    def places(self, limit: int, live_limit: int = 0) -> dict[UUID, int]:
        """How many requests of each job a claim takes, in the order in which they should run. See `claim`."""
        live = [candidate for candidate in self.candidates if candidate.is_live]
        places = share(max(limit, live_limit), live, self.running, self.weights) if live else {}
        left = limit - sum(places.values())
        if left > 0:
            others = [candidate for candidate in self.candidates if not candidate.is_live]
            places |= share(left, others, self.running, self.weights)
        return places


def claim(
    connection: Connection,
    worker_id: UUID,
    model: str,
    *,
    limit: int,
    is_idle: bool,
    solo_after_deaths: int,
    max_bytes: int | None = None,
    live_limit: int = 0,
) -> Claim:
    """Take up to `limit` requests of a model, or `live_limit` of those whose callers wait, where that is more.

    Live requests come first, and count towards `limit`. Raises `LeaseLost` if the worker's lease is over.
    The claim ends with the body that reaches `max_bytes`. A request that was running when `solo_after_deaths` workers
    died is taken alone, by an idle worker.
    """
    force_index_scans(connection)
    # Check the lease, and lock the worker's row until commit so that no reaper ends the worker before its rows are set.
    alive = connection.execute(
        text("""
            SELECT 1 FROM workers
            WHERE id = :id AND ended_at IS NULL AND lease_expires_at > clock_timestamp()
            FOR KEY SHARE
        """),
        {"id": worker_id},
    ).scalar()
    if alive is None:
        raise LeaseLost("The worker's lease is over.")
    suspect = suspect_job(connection, model, solo_after_deaths)
    if suspect is not None:
        if not is_idle:
            return Claim((), wants_idle=True)
        alone = _take(connection, worker_id, [(suspect, 1)], deaths=(solo_after_deaths, MANY_DEATHS), max_bytes=None)
        if alone:
            waits.note_claim(connection, worker_id, model, {suspect.job_id: 1})
            line_events.note_alone(connection, alone[0].token)
            return Claim(alone, is_solo=True)
    queue = read_queue(connection, model, solo_after_deaths)
    candidates = {candidate.job_id: candidate for candidate in queue.candidates}
    chosen = [(candidates[job_id], places) for job_id, places in queue.places(limit, live_limit).items()]
    taken = _take(connection, worker_id, chosen, deaths=(0, solo_after_deaths), max_bytes=max_bytes)
    fresh = {candidate.job_id: candidate for candidate in queue.candidates if candidate.is_fresh}
    by_job = Counter(request.job_id for request in taken)
    first_of = by_job.keys() & fresh.keys()
    if shown := [job_id for job_id in first_of if not fresh[job_id].is_live]:
        job_events.add_first_claims(connection, shown, worker_id)
    if taken:
        waits.note_claim(connection, worker_id, model, by_job)
    is_cut = max_bytes is not None and sum(len(request.body) for request in taken) >= max_bytes
    return Claim(taken, is_cut=is_cut, first_of=first_of)


def share(
    limit: int, candidates: Sequence[Candidate], running: Mapping[UUID, int], weights: Mapping[UUID, int]
) -> dict[UUID, int]:
    """Divide `limit` places among jobs: `{job_id: places}`, in the order in which the requests should run.

    Each place goes to the tenant with the fewest running requests for its weight, those given here included; within a
    tenant, to its jobs in the order of `candidates`. Smaller shares come first, so that they do not queue in an engine
    behind a large one. `weights` are 1 where not given.
    """
    queues: dict[UUID, deque[Candidate]] = defaultdict(deque)
    for candidate in candidates:
        queues[candidate.tenant_id].append(candidate)
    tenants = sorted(queues, key=lambda tenant: min(job.job_id for job in queues[tenant]))
    given = _divide(
        limit,
        [
            (running.get(tenant, 0), weights.get(tenant, 1), sum(job.waiting for job in queues[tenant]))
            for tenant in tenants
        ],
    )
    places: dict[UUID, int] = {}
    for count, tenant in sorted(zip(given, tenants, strict=True), key=lambda share: share[0]):
        left = count
        while left > 0:
            job = queues[tenant].popleft()
            places[job.job_id] = min(left, job.waiting)
            left -= places[job.job_id]
    return places


def _divide(limit: int, tenants: Sequence[tuple[int, int, int]]) -> list[int]:
    """How many of `limit` places go to each tenant of `(running, weight, waiting)`. Equal tenants take turns.

    Highest averages (D'Hondt): the next place goes where running requests, it included, are fewest for the weight.
    """
    given = [0] * len(tenants)
    heap = [((running + 1) / weight, turn) for turn, (running, weight, waiting) in enumerate(tenants) if waiting > 0]
    heapify(heap)
    while limit > 0 and heap:
        _, turn = heap[0]
        running, weight, waiting = tenants[turn]
        given[turn] += 1
        limit -= 1
        if given[turn] == waiting:
            heappop(heap)
        else:
            heapreplace(heap, ((running + given[turn] + 1) / weight, turn))
    return given


def claims_of(connection: Connection, worker_id: UUID) -> set[ClaimToken]:
    """The claims that a worker holds; anything else it computes was cancelled, expired or released."""
    # The partial index of running requests answers this.
    rows = connection.execute(
        text("SELECT job_id, line, epoch FROM requests WHERE worker_id = :id AND state = 'running'"), {"id": worker_id}
    )
    return {ClaimToken(row.job_id, row.line, row.epoch, worker_id) for row in rows}


def release(connection: Connection, claims: Collection[ClaimToken]) -> int:
    """Make claimed requests pending again, without counting a death. Returns how many of the claims still stood."""
    force_index_scans(connection)
    lock_jobs(connection, {claim.job_id for claim in claims})
    # The fence of `settle`, by the row's place (docs/decisions/0010): a row claimed anew since then does not match.
    released: int = connection.execute(
        text(f"""
            WITH freed AS (
                UPDATE requests r SET state = 'pending', worker_id = NULL
                FROM unnest(CAST(:job_ids AS uuid[]), CAST(:lines AS int[]), CAST(:epochs AS int[]),
                            CAST(:holders AS uuid[])) AS c (job_id, line, epoch, holder)
                CROSS JOIN LATERAL (
                    SELECT q.ctid AS row FROM requests q WHERE q.job_id = c.job_id AND q.line = c.line OFFSET 0
                ) found
                WHERE r.ctid = found.row AND r.epoch = c.epoch AND r.worker_id = c.holder AND r.state = 'running'
                RETURNING r.job_id, r.line, r.epoch, c.holder AS worker_id
            ), noted AS ({line_events.NOTE_FREED})
            SELECT count(*) FROM freed
        """),
        {
            "event": LineEvent.GIVEN_BACK,
            "job_ids": [claim.job_id for claim in claims],
            "lines": [claim.line for claim in claims],
            "epochs": [claim.epoch for claim in claims],
            "holders": [claim.holder for claim in claims],
        },
    ).scalar_one()
    return released


def read_queue(connection: Connection, model: str, solo_after_deaths: int) -> Queue:
    """What a claim of this moment chooses from."""
    by_job = _running_requests(connection)
    # The first claimable jobs of each tenant. Open requests are read from the job's row, because counting pending ones
    # would read hundreds of rows in each job. Of a job that runs nothing every open request is pending; the few others
    # are looked into, where OFFSET 0 keeps EXISTS a look at one row (decision 0010).
    jobs = connection.execute(
        text("""
            SELECT ranked.id, ranked.tenant_id, ranked.open, ranked.is_live, ranked.last_seq, ranked.priority, t.weight
            FROM (
                SELECT j.id, j.tenant_id, j.priority, j.is_live, j.last_seq, j.total - j.last_seq AS open,
                       row_number() OVER (
                           PARTITION BY j.tenant_id, j.is_live ORDER BY j.priority DESC, j.id
                       ) AS place
                FROM jobs j
                WHERE j.model = :model AND j.state = 'in_progress' AND j.ended_at IS NULL AND j.paused_at IS NULL
                  AND (j.expires_at IS NULL OR j.expires_at > clock_timestamp())
                  AND CASE WHEN j.id = ANY(CAST(:held AS uuid[])) THEN EXISTS (
                      SELECT 1 FROM requests r
                      WHERE r.job_id = j.id AND r.state = 'pending' AND r.deaths < :solo_after_deaths OFFSET 0
                  ) ELSE j.total > j.last_seq END
            ) ranked
            JOIN tenants t ON t.id = ranked.tenant_id
            WHERE ranked.place <= :jobs
            ORDER BY ranked.priority DESC, ranked.id
        """),
        {"model": model, "jobs": JOBS_PER_TENANT, "solo_after_deaths": solo_after_deaths, "held": list(by_job)},
    ).all()
    running_by_tenant: dict[UUID, int] = defaultdict(int)
    for tenant_id, requests in by_job.values():
        running_by_tenant[tenant_id] += requests
    candidates = []
    for job in jobs:
        _, running = by_job.get(job.id, (job.tenant_id, 0))
        if job.open > running:
            is_fresh = job.last_seq == 0 and running == 0
            waiting = job.open - running
            candidates.append(Candidate(job.id, job.tenant_id, waiting, job.is_live, is_fresh, job.priority))
    return Queue(
        candidates,
        running_by_tenant,
        {job.tenant_id: job.weight for job in jobs},
        {job_id: requests for job_id, (_, requests) in by_job.items()},
    )


def _running_requests(connection: Connection) -> dict[UUID, tuple[UUID, int]]:
    """Of each job with running requests, its tenant and how many they are."""
    # There are as many as the engines hold; OFFSET 0 reads them by their partial index.
    rows = connection.execute(
        text("""
            SELECT r.job_id, j.tenant_id, count(*) AS requests
            FROM (SELECT job_id FROM requests WHERE state = 'running' OFFSET 0) r JOIN jobs j ON j.id = r.job_id
            GROUP BY r.job_id, j.tenant_id
        """)
    )
    return {row.job_id: (row.tenant_id, row.requests) for row in rows}


def suspect_job(connection: Connection, model: str, solo_after_deaths: int) -> Candidate | None:
    """A claimable job with a request that must run alone, which is what waits of it."""
    # `deaths > 0` selects the partial index of the few requests that saw a worker die.
    suspect = connection.execute(
        text("""
            SELECT r.job_id, j.tenant_id, j.is_live
            FROM requests r JOIN jobs j ON j.id = r.job_id
            WHERE r.state = 'pending' AND r.deaths > 0 AND r.deaths >= :solo_after_deaths
              AND j.model = :model AND j.state = 'in_progress' AND j.ended_at IS NULL AND j.paused_at IS NULL
              AND (j.expires_at IS NULL OR j.expires_at > clock_timestamp())
            ORDER BY r.job_id
            LIMIT 1
        """),
        {"model": model, "solo_after_deaths": solo_after_deaths},
    ).one_or_none()
    return None if suspect is None else Candidate(suspect.job_id, suspect.tenant_id, 1, suspect.is_live)


def _take(
    connection: Connection,
    worker_id: UUID,
    chosen: Sequence[tuple[Candidate, int]],
    *,
    deaths: tuple[int, int],
    max_bytes: int | None,
) -> tuple[ClaimedRequest, ...]:
    """Claim up to so many requests of each job, in the order of `chosen`.

    Their deaths are within `[deaths[0], deaths[1])`. The last one reaches `max_bytes`.
    """
    if not chosen:
        return ()
    # Lock rows in prefix order, so that prompts which begin alike meet in one engine, skipping rows that another claim
    # holds; read each body by its whole key (decision 0010 on `BETWEEN … LIMIT 1`); update those that begin before
    # `max_bytes` where they were locked.
    rows = connection.execute(
        text("""
            WITH quota AS (
                SELECT * FROM unnest(CAST(:job_ids AS uuid[]), CAST(:places AS int[]))
                    WITH ORDINALITY AS q (job_id, places, turn)
            ), picked AS MATERIALIZED (
                SELECT q.turn, p.*
                FROM quota q CROSS JOIN LATERAL (
                    SELECT r.ctid AS row, r.job_id, r.line, r.prefix FROM requests r
                    WHERE r.job_id = q.job_id AND r.state = 'pending' AND r.deaths >= :fewest AND r.deaths < :most
                    ORDER BY r.prefix, r.line
                    LIMIT q.places
                    FOR UPDATE SKIP LOCKED
                ) p
            ), measured AS MATERIALIZED (
                SELECT p.*, b.body,
                       sum(octet_length(b.body)) OVER (ORDER BY p.turn, p.prefix, p.line)
                           - octet_length(b.body) AS start
                FROM picked p CROSS JOIN LATERAL (
                    SELECT body FROM bodies b
                    WHERE b.job_id = p.job_id AND b.line BETWEEN p.line AND p.line
                    ORDER BY b.line
                    LIMIT 1
                ) b
            ), taken AS (
                UPDATE requests r SET state = 'running', worker_id = :worker_id, epoch = r.epoch + 1,
                                      claimed_at = statement_timestamp()
                FROM measured m
                WHERE r.ctid = m.row AND (CAST(:max_bytes AS bigint) IS NULL OR m.start < :max_bytes)
                RETURNING m.turn, r.prefix, r.line, r.epoch, m.body
            )
            SELECT turn, line, epoch, body FROM taken ORDER BY turn, prefix, line
        """),
        {
            "worker_id": worker_id,
            "job_ids": [job.job_id for job, _ in chosen],
            "places": [places for _, places in chosen],
            "fewest": deaths[0],
            "most": deaths[1],
            "max_bytes": max_bytes,
        },
        execution_options=BINARY_RESULTS,
    ).all()
    claimed = []
    for turn, line, epoch, body in rows:
        job, _ = chosen[turn - 1]
        claimed.append(ClaimedRequest(job.job_id, line, epoch, worker_id, job.tenant_id, body, job.is_live))
    return tuple(claimed)
