"""Why a job waits is what the next claim does: told from the same candidates by the same division of places."""

from __future__ import annotations

import random
from uuid import UUID

import pytest

from jobs.queries import claiming, reading, workers
from jobs.queries.explaining import Wait, explain, read_model_queue
from tests.support.rows import MODEL, Rows


def explained(rows: Rows, job_id: UUID, *, limit: int = 4) -> Wait | None:
    with rows.database.begin() as connection:
        (tenant_id,) = connection.exec_driver_sql("SELECT tenant_id FROM jobs WHERE id = %s", (job_id,)).one()
        job = reading.get_job(connection, tenant_id, job_id)
        assert job is not None
        return explain(job, read_model_queue(connection, MODEL.name, limit=limit, solo_after_deaths=2))


def code(rows: Rows, job_id: UUID, *, limit: int = 4) -> str | None:
    wait = explained(rows, job_id, limit=limit)
    return None if wait is None else wait.code


@pytest.mark.parametrize("seed", range(25))
def test_explanation_says_next_exactly_where_a_claim_takes_a_line(rows: Rows, seed: int) -> None:
    chance = random.Random(seed)
    worker_id, other = rows.worker(), rows.worker()
    jobs = [
        rows.job(chance.randint(1, 5), tenant=chance.choice("abc"), priority=chance.choice([-5, 0, 0, 7]))
        for _ in range(chance.randint(2, 12))
    ]
    for tenant in "abc":
        rows.execute("UPDATE tenants SET weight = :weight WHERE name = :name", weight=chance.randint(1, 4), name=tenant)
    rows.claim(other, limit=chance.randint(0, 6))
    for job_id in jobs:
        change = chance.choice(["paused", "live", "cancelling", "deaths", "", "", "", ""])
        if change == "paused":
            rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=job_id)
        elif change == "live":
            rows.execute("UPDATE jobs SET is_live = true WHERE id = :id", id=job_id)
        elif change == "cancelling":
            rows.execute("UPDATE jobs SET state = 'cancelling' WHERE id = :id", id=job_id)
        elif change == "deaths" and seed % 5 == 0:
            rows.execute("UPDATE requests SET deaths = 2 WHERE job_id = :id AND line = 1", id=job_id)
    limit = chance.randint(1, 12)
    said = {job_id: code(rows, job_id, limit=limit) for job_id in jobs}
    taken = {request.job_id for request in rows.claim(worker_id, limit=limit).requests}
    assert {job_id for job_id, reason in said.items() if reason == "next"} == taken, said
    waiting = {row.job_id for row in rows.query("SELECT DISTINCT job_id FROM requests WHERE state = 'pending'")} | taken
    assert {job_id for job_id, reason in said.items() if reason is not None} == waiting


def test_explanation_names_the_model_without_a_live_worker(rows: Rows) -> None:
    job_id, worker_id = rows.job(2), rows.worker()
    rows.execute(
        "UPDATE workers SET heartbeat_at = '2026-01-02 13:02:03+00', lease_expires_at = '2026-01-02 13:02:33+00'"
        " WHERE id = :id",
        id=worker_id,
    )
    wait = explained(rows, job_id)
    assert wait is not None
    assert wait.code == "no_worker"
    assert wait.text == "No live worker for demo, last seen 2026-01-02 13:02 UTC."
    assert wait.args == {"model": "demo", "last_seen": 1767358923}
    rows.execute("DELETE FROM workers")
    assert explained(rows, job_id) == Wait(
        "no_worker", "No live worker for demo.", {"model": "demo", "last_seen": None}
    )


def test_explanation_says_that_the_worker_serves_another_model_now(rows: Rows) -> None:
    job_id, worker_id = rows.job(2), rows.worker()
    rows.execute("INSERT INTO models (name, max_model_len, vocab_size) VALUES ('other', 1, 1)")
    with rows.database.begin() as connection:
        assert workers.turn_to(connection, worker_id, "other", beside_others=False)
    assert explained(rows, job_id) == Wait(
        "other_model",
        "Its worker serves other now, and demo when those lines are done or this model has waited long enough.",
        {"model": "demo", "present": ["other"], "workers": 1},
    )


def test_explanation_of_one_tenants_jobs_goes_by_priority_and_age(rows: Rows) -> None:
    rows.worker()
    first, second, urgent = rows.job(3), rows.job(3), rows.job(9, priority=5)
    assert explained(rows, first) == Wait(
        "priority", "Behind 9 lines of 1 job of yours with a higher priority.", {"jobs": 1, "lines": 9, "priority": 0}
    )
    rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=urgent)
    assert code(rows, first, limit=3) == "next"
    assert explained(rows, second, limit=3) == Wait(
        "older_jobs", "Behind 3 lines of 1 job of yours that are older.", {"jobs": 1, "lines": 3}
    )


def test_explanation_counts_the_jobs_that_a_claim_considers(rows: Rows) -> None:
    rows.worker()
    jobs = [rows.job(1) for _ in range(claiming.JOBS_PER_TENANT + 1)]
    wait = explained(rows, jobs[-1], limit=1000)
    assert wait is not None
    assert (wait.code, wait.args["jobs"]) == ("older_jobs", claiming.JOBS_PER_TENANT)


def test_explanation_names_the_share_of_other_tenants(rows: Rows) -> None:
    running = rows.job(4, tenant="a")
    rows.claim(rows.worker(), limit=4)
    mine, others = rows.job(4, tenant="a"), rows.job(4, tenant="b")
    assert code(rows, running) is None
    assert code(rows, others, limit=2) == "next"
    assert explained(rows, mine, limit=2) == Wait(
        "fair_share", "4 lines of yours run now, which is your share while other tenants wait.", {"running": 4}
    )


def test_explanation_says_that_a_pause_does_not_stop_the_window(rows: Rows) -> None:
    rows.worker()
    job_id = rows.job(2, window="1h")
    rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=job_id)
    wait = explained(rows, job_id)
    assert wait is not None
    assert wait.code == "paused"
    assert "completion window goes on" in wait.text
    rows.execute("UPDATE jobs SET expires_at = clock_timestamp() - interval '1 second' WHERE id = :id", id=job_id)
    assert code(rows, job_id) == "out_of_time"


def test_line_that_runs_alone_holds_back_the_others(rows: Rows) -> None:
    rows.worker()
    suspect, other = rows.job(2), rows.job(2)
    rows.execute("UPDATE requests SET deaths = 2 WHERE job_id = :id AND line = 1", id=suspect)
    assert code(rows, suspect) == "next"
    assert code(rows, other) == "alone"
