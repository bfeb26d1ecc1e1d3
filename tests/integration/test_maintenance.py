"""The courier's maintenance tasks over a real Postgres, called one by one."""

from __future__ import annotations

import logging
import threading

import pytest

from jobs.queries import tenants
from jobs.queries.retention import delete_job
from jobs.settings import Settings
from tests.support.rows import Rows
from worker.app import make_app
from worker.courier.maintenance import WORKERS_KEPT, Maintenance
from worker.courier.metrics import CourierMetrics


def maintenance(rows: Rows, metrics: CourierMetrics | None = None, **settings: object) -> Maintenance:
    chosen = Settings.model_validate({"redis_url": "redis://127.0.0.1:1/0"} | settings)
    return Maintenance(rows.database, chosen, make_app(chosen, "test"), metrics or CourierMetrics())


def test_delete_old_removes_jobs_past_their_retention(rows: Rows) -> None:
    old, recent, running = rows.job(1), rows.job(1), rows.job(1)
    worker_id = rows.worker()
    rows.settle(rows.claim(worker_id, limit=2).requests)
    rows.execute("UPDATE jobs SET ended_at = ended_at - interval '1 hour' WHERE id = :id", id=old)
    maintenance(rows, retention=1800.0).delete_old(threading.Event())
    assert {row.id for row in rows.query("SELECT id FROM jobs")} == {recent, running}


def test_delete_old_removes_workers_of_long_ago(rows: Rows) -> None:
    long_ago, lately, alive = rows.worker(), rows.worker(), rows.worker()
    statement = "UPDATE workers SET ended_at = clock_timestamp() - make_interval(secs => :age) WHERE id = :id"
    rows.execute(statement, age=WORKERS_KEPT + 60, id=long_ago)
    rows.execute(statement, age=WORKERS_KEPT - 60, id=lately)
    maintenance(rows).delete_old(threading.Event())
    assert {row.id for row in rows.query("SELECT id FROM workers")} == {lately, alive}


def test_delete_old_removes_audit_entries_past_their_retention(rows: Rows) -> None:
    name = rows.tenant().name
    with rows.database.begin() as connection:
        for weight in (1, 2):
            assert tenants.set_weight(connection, name, weight)
    rows.execute(
        "UPDATE audit SET at = at - interval '1 hour' WHERE detail = CAST(:first AS jsonb)", first='{"weight": 1}'
    )
    maintenance(rows, audit_retention=1800.0).delete_old(threading.Event())
    assert [row.detail for row in rows.query("SELECT detail FROM audit")] == [{"weight": 2}]


def test_delete_old_reports_the_retries_that_end_with_a_deleted_job(
    rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    deleted, _ = (rows.job(1, webhook="http://receiver.example") for _ in range(2))
    rows.settle(rows.claim(rows.worker()).requests)
    [event] = rows.query("SELECT id FROM events WHERE job_id = :id", id=deleted)
    with rows.database.begin() as connection:
        assert delete_job(connection, rows.tenant().id, deleted)
    with caplog.at_level(logging.WARNING):
        maintenance(rows).delete_old(threading.Event())
    assert f"event evt_{event.id.hex}: given up, its job was deleted" in caplog.text
    assert caplog.text.count("given up") == 1
    assert len(rows.query("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL")) == 1


def test_rescue_stalled_counts_what_a_dead_worker_held(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.courier.maintenance.PATIENCE", 0)
    rows.job(2)
    worker_id = rows.worker()
    rows.claim(worker_id, limit=2)
    rows.execute("UPDATE requests SET deaths = 2 WHERE line = 2")
    rows.execute(
        "UPDATE workers SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE id = :id", id=worker_id
    )
    metrics = CourierMetrics()
    maintenance(rows, metrics).rescue_stalled(threading.Event())
    value = metrics.registry.get_sample_value
    assert value("pagemill:dead_workers_total") == 1
    assert value("pagemill:rescued_requests_total", {"outcome": "freed"}) == 1
    assert value("pagemill:rescued_requests_total", {"outcome": "given_up"}) == 1
