"""Registration, heartbeats and the end of a worker: the lease is Postgres' word, by Postgres' clock."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobs.errors import LeaseLost
from jobs.ids import new_id
from jobs.queries import fleet, live, reading, workers
from jobs.queries.backlog import read_backlog
from jobs.queries.claiming import claims_of
from jobs.queries.demand import Demand, read_demand
from jobs.queries.rescue import reap_worker
from jobs.queries.workers import WorkerIdentity
from jobs.requests import ModelLimits
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import MODEL, Rows


def test_register_makes_the_model_known(rows: Rows) -> None:
    identity = WorkerIdentity(new_id(), "host", 7, "cpu")
    with rows.database.begin() as connection:
        workers.register(connection, identity, ModelLimits("new", 64, 50), lease=30)
        served = {model.name: model for model in reading.list_models(connection)}
    assert (served["new"].max_model_len, served["new"].vocab_size, served["new"].live_workers) == (64, 50, 1)
    assert served[MODEL.name].live_workers == 0


def test_register_updates_the_limits_of_a_known_model(rows: Rows) -> None:
    job_id = rows.job(1)
    identity = WorkerIdentity(new_id(), "host", 7, "cpu")
    with rows.database.begin() as connection:
        workers.register(connection, identity, ModelLimits(MODEL.name, 4096, 32000), lease=30)
    (model,) = rows.query("SELECT max_model_len, vocab_size, updated_at > registered_at AS updated FROM models")
    assert tuple(model) == (4096, 32000, True)
    assert rows.states(job_id) == ["pending"]


def test_worker_of_several_models_is_a_live_worker_of_each(rows: Rows) -> None:
    identity = WorkerIdentity(new_id(), "host", 7, "cpu")
    with rows.database.begin() as connection:
        workers.register(connection, identity, MODEL, others=[ModelLimits("new", 64, 50)], lease=30)
        served = {model.name: model.live_workers for model in reading.list_models(connection)}
        waiting = {model.model: model.live_workers for model in read_backlog(connection).models}
        assert served == waiting == {MODEL.name: 1, "new": 1}
        assert live.find_models(connection, ["new"])["new"].is_served
        assert live.only_live_model(connection) is None
        assert workers.turn_to(connection, identity.id, "new", beside_others=False)
        worker = fleet.get_worker(connection, identity.id)
    assert worker is not None
    assert (worker.model, worker.models) == ("new", [MODEL.name, "new"])


def test_demand_is_of_lines_that_a_claim_could_take(rows: Rows) -> None:
    worker_id, other = rows.worker(), rows.worker()

    def demand() -> Demand | None:
        with rows.database.begin() as connection:
            return read_demand(connection, worker_id, [MODEL.name, "new"]).get(MODEL.name)

    assert demand() is None
    job_id = rows.job(2)
    rows.execute("UPDATE jobs SET in_progress_at = clock_timestamp() - interval '90 seconds' WHERE id = :id", id=job_id)
    found = demand()
    assert found is not None
    assert 90 <= found.waiting < 90 + PATIENCE
    assert (found.live_waiting, found.is_served) == (None, True)
    rows.lapse(other)
    rows.execute("UPDATE jobs SET is_live = true WHERE id = :id", id=job_id)
    found = demand()
    assert found is not None
    assert found.live_waiting is not None
    assert 90 <= found.live_waiting < 90 + PATIENCE
    assert not found.is_served
    rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=job_id)
    assert demand() is None
    rows.execute("UPDATE jobs SET paused_at = NULL WHERE id = :id", id=job_id)
    rows.claim(worker_id, limit=2)
    assert demand() is None


def test_heartbeat_renews_the_lease_by_the_clock_of_postgres(rows: Rows) -> None:
    worker_id = rows.worker(lease=1)
    _beat(rows, worker_id, lease=50)
    (row,) = rows.query("SELECT lease_expires_at - heartbeat_at AS lease, stats FROM workers")
    assert timedelta(seconds=49) < row.lease < timedelta(seconds=51)
    assert row.stats == {"running": 3}


def test_late_heartbeat_renews_the_lease_when_no_reaper_came(rows: Rows) -> None:
    worker_id = rows.worker()
    rows.lapse(worker_id)
    _beat(rows, worker_id)
    assert _reap(rows) is None


def test_heartbeat_raises_lease_lost_when_the_worker_was_reaped(rows: Rows) -> None:
    rows.job(1)
    worker_id = rows.worker()
    rows.claim(worker_id)
    rows.lapse(worker_id)
    assert _reap(rows) == worker_id
    with pytest.raises(LeaseLost):
        _beat(rows, worker_id)
    (row,) = rows.query(
        "SELECT ended_at IS NOT NULL AS ended, lease_expires_at < clock_timestamp() AS over FROM workers"
    )
    assert tuple(row) == (True, True)


def test_worker_is_reaped_when_its_lease_runs_out(rows: Rows) -> None:
    worker_id = rows.worker(lease=0.1)
    await_condition(lambda: _reap(rows) == worker_id, "reaping of a silent worker")


def test_end_releases_requests_without_counting_a_death(rows: Rows) -> None:
    job_id, worker_id, other = rows.job(5), rows.worker(), rows.worker()
    rows.claim(worker_id, limit=3)
    rows.claim(other, limit=1)
    with rows.database.begin() as connection:
        assert workers.end(connection, worker_id) == 3
        assert claims_of(connection, worker_id) == set()
        assert {hold[:2] for hold in claims_of(connection, other)} == {(job_id, 4)}
        assert workers.end(connection, worker_id) == 0
    assert rows.states(job_id) == ["pending", "pending", "pending", "running", "pending"]
    assert {row.deaths for row in rows.query("SELECT deaths FROM requests")} == {0}
    events = rows.query("SELECT line, kind, worker_id FROM line_events ORDER BY line")
    assert [tuple(event) for event in events] == [(line, "given_back", worker_id) for line in (1, 2, 3)]
    rows.check()


def test_lapsed_and_ended_workers_do_not_count_as_live(rows: Rows) -> None:
    alive, lapsed, ended = rows.worker(), rows.worker(), rows.worker()
    rows.lapse(lapsed)
    with rows.database.begin() as connection:
        workers.end(connection, ended)
        (model,) = reading.list_models(connection)
    assert model.live_workers == 1
    assert alive not in (lapsed, ended)


def _beat(rows: Rows, worker_id: object, lease: float = 30) -> None:
    with rows.database.begin() as connection:
        workers.heartbeat(connection, worker_id, lease=lease, stats={"running": 3})  # type: ignore[arg-type]


def _reap(rows: Rows) -> object:
    with rows.database.begin() as connection:
        buried = reap_worker(connection, max_deaths=3)
    return None if buried is None else buried.worker_id
