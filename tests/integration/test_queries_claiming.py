"""Claims against the real Postgres: which worker gets which requests, and none gets another's."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from jobs.errors import LeaseLost
from jobs.ids import new_id
from jobs.queries import live, rescue
from jobs.queries.claiming import ClaimedRequest, claim, claims_of, release
from jobs.queries.live import LiveState
from jobs.queries.tenants import TenantWeight, list_weights, set_weight
from jobs.requests import StagedLine
from tests.support.rows import MODEL, Rows


def test_claim_returns_token_tenant_and_body(rows: Rows) -> None:
    job_id, worker_id = rows.job(1), rows.worker()
    (request,) = rows.claim(worker_id).requests
    assert request == ClaimedRequest(
        job_id,
        line=1,
        epoch=1,
        holder=worker_id,
        tenant_id=rows.tenant().id,
        body=b'{"prompt":"1+1="}',
    )
    assert rows.states(job_id) == ["running"]
    assert rows.claim(worker_id).requests == ()


def test_claim_passes_by_a_job_that_is_not_published(rows: Rows) -> None:
    rows.job(2, published=False)
    assert rows.claim(rows.worker()).requests == ()


def test_claim_passes_by_requests_of_another_model(rows: Rows) -> None:
    rows.job(2)
    rows.execute("INSERT INTO models (name, max_model_len, vocab_size) VALUES ('other', 1, 1)")
    rows.execute("UPDATE jobs SET model = 'other'")
    assert rows.claim(rows.worker()).requests == ()


def test_claim_passes_by_a_job_past_its_window(rows: Rows) -> None:
    job_id = rows.job(2, window="1h")
    rows.execute("UPDATE jobs SET expires_at = clock_timestamp() WHERE id = :id", id=job_id)
    assert rows.claim(rows.worker()).requests == ()


def test_jobs_of_a_tenant_are_claimed_by_priority_then_age(rows: Rows) -> None:
    old, urgent, new = rows.job(2), rows.job(2, priority=1), rows.job(2)
    worker_id = rows.worker()
    taken = [(request.job_id, request.line) for request in rows.claim(worker_id, limit=3).requests]
    assert taken == [(urgent, 1), (urgent, 2), (old, 1)]
    taken = [(request.job_id, request.line) for request in rows.claim(worker_id).requests]
    assert taken == [(old, 2), (new, 1), (new, 2)]


def test_tenants_get_equal_places_when_their_jobs_differ_in_size(rows: Rows) -> None:
    large, small = rows.job(100, tenant="large"), rows.job(4, tenant="small")
    worker_id = rows.worker()
    assert _by_job(rows.claim(worker_id, limit=6).requests) == {large: 3, small: 3}
    # What already runs counts: the tenant with less of it is next.
    rows.settle([request for request in _held(rows, worker_id) if request.job_id == small])
    assert _by_job(rows.claim(worker_id, limit=2).requests) == {large: 1, small: 1}


def test_tenant_gets_places_by_its_weight(rows: Rows) -> None:
    light, heavy = rows.job(100, tenant="light"), rows.job(100, tenant="heavy")
    with rows.database.begin() as connection:
        assert set_weight(connection, "heavy", 3)
        assert not set_weight(connection, "nowhere", 3)
        assert list_weights(connection) == [TenantWeight("heavy", 3), TenantWeight("light", 1)]
    assert _by_job(rows.claim(rows.worker(), limit=40).requests) == {light: 10, heavy: 30}


def test_small_job_ends_soon_when_another_tenant_has_the_highest_priority(rows: Rows) -> None:
    large, worker_id = rows.job(600, tenant="large", priority=100), rows.worker()
    running = list(rows.claim(worker_id, limit=32).requests)
    small = rows.job(10, tenant="small")
    rounds = 0
    while rows.job_row(small).state == "in_progress":
        # An engine that serves in order of arrival, four requests a round; alone, the small job takes three rounds.
        rows.settle(running[:4])
        running = running[4:] + list(rows.claim(worker_id, limit=4).requests)
        rounds += 1
        assert rounds < 20
    assert rounds <= 12  # the large job's 32 that ran already, and the three
    assert rows.job_row(large).state == "in_progress"


def test_smaller_share_comes_first_in_a_claim(rows: Rows) -> None:
    large, small = rows.job(100, tenant="large", priority=100), rows.job(2, tenant="small")
    claimed = rows.claim(rows.worker(), limit=50).requests
    assert [request.job_id for request in claimed] == [small] * 2 + [large] * 48


def test_claim_ends_with_the_body_that_reaches_its_limit_of_bytes(rows: Rows) -> None:
    rows.job(5)  # of 17 bytes each
    worker_id = rows.worker()
    with rows.database.begin() as connection:
        for limit, expected, is_cut in ((1, [1], True), (34, [2, 3], True), (1000, [4, 5], False)):
            claimed = claim(
                connection, worker_id, MODEL.name, limit=100, is_idle=True, solo_after_deaths=2, max_bytes=limit
            )
            assert [request.line for request in claimed.requests] == expected
            assert claimed.is_cut == is_cut
    rows.check()


def test_running_requests_of_a_job_do_not_count_as_waiting(rows: Rows) -> None:
    old, new = rows.job(3), rows.job(5)
    worker_id = rows.worker()
    assert _by_job(rows.claim(worker_id, limit=2).requests) == {old: 2}
    assert _by_job(rows.claim(worker_id, limit=4).requests) == {old: 1, new: 3}


def test_claim_orders_requests_by_prefix(rows: Rows) -> None:
    rows.job(6, prefixes=[7, -3, 7, 5, -3, 7])
    worker_id = rows.worker()
    assert [request.line for request in rows.claim(worker_id, limit=4).requests] == [2, 5, 4, 1]
    assert [request.line for request in rows.claim(worker_id).requests] == [3, 6]


@pytest.mark.parametrize("lease_is_over_by", ["time", "reaper", "itself"])
def test_claim_raises_lease_lost_when_the_lease_is_over(rows: Rows, lease_is_over_by: str) -> None:
    rows.job(1)
    worker_id = rows.worker()
    if lease_is_over_by == "time":
        rows.lapse(worker_id)
    else:
        rows.execute("UPDATE workers SET ended_at = clock_timestamp()")
    with pytest.raises(LeaseLost):
        rows.claim(worker_id)


def test_claim_raises_lease_lost_when_the_worker_is_unknown(rows: Rows) -> None:
    rows.job(1)
    with pytest.raises(LeaseLost):
        rows.claim(UUID(int=1))


def test_concurrent_claims_never_take_one_request_twice(rows: Rows) -> None:
    jobs = [rows.job(200, tenant=f"tenant {number}") for number in range(3)]
    start = threading.Barrier(10)

    def drain() -> list[ClaimedRequest]:
        worker_id, mine = rows.worker(), []
        start.wait()
        # SKIP LOCKED may hand out nothing although rows wait: others have them under their eyes at this moment.
        while "pending" in {state for job_id in jobs for state in rows.states(job_id)}:
            mine += rows.claim(worker_id, limit=7).requests
        return mine

    with ThreadPoolExecutor(10) as pool:
        claimed = [request for mine in pool.map(lambda _: drain(), range(10)) for request in mine]
    assert Counter((request.job_id, request.line) for request in claimed) == Counter(
        (job_id, line) for job_id in jobs for line in range(1, 201)
    )
    assert {request.epoch for request in claimed} == {1}
    rows.check()


def test_claim_passes_by_rows_that_are_locked(rows: Rows) -> None:
    job_id, worker_id = rows.job(3), rows.worker()
    with rows.database.begin() as other:
        other.exec_driver_sql(f"SELECT 1 FROM requests WHERE job_id = '{job_id}' AND line = 2 FOR UPDATE")
        assert [request.line for request in rows.claim(worker_id).requests] == [1, 3]
    assert [request.line for request in rows.claim(worker_id).requests] == [2]


def test_release_counts_no_death_and_keeps_the_epoch(rows: Rows) -> None:
    rows.job(3)
    first, second = rows.worker(), rows.worker()
    held = rows.claim(first).requests
    with rows.database.begin() as connection:
        assert release(connection, [request.token for request in held[:2]]) == 2
        assert claims_of(connection, first) == {held[2].token}
    again = rows.claim(second).requests
    assert [(request.line, request.epoch, request.holder) for request in again] == [(1, 2, second), (2, 2, second)]
    assert {row.deaths for row in rows.query("SELECT deaths FROM requests")} == {0}
    # Too late: they are another's now, and stay there.
    with rows.database.begin() as connection:
        assert release(connection, [request.token for request in held[:2]]) == 0
    rows.check()


def test_release_passes_by_a_claim_of_another_epoch(rows: Rows) -> None:
    job_id, worker_id = rows.job(1), rows.worker()
    (first,) = rows.claim(worker_id).requests
    with rows.database.begin() as connection:
        assert release(connection, [first.token]) == 1
    (second,) = rows.claim(worker_id).requests
    assert (second.epoch, second.holder) == (2, first.holder)
    with rows.database.begin() as connection:
        assert release(connection, [first.token]) == 0
    assert rows.states(job_id) == ["running"]


def _by_job(claimed: tuple[ClaimedRequest, ...]) -> dict[UUID, int]:
    return dict(Counter(request.job_id for request in claimed))


def _held(rows: Rows, worker_id: UUID) -> list[ClaimedRequest]:
    held = rows.query(
        "SELECT r.job_id, r.line, r.epoch, j.tenant_id FROM requests r JOIN jobs j ON j.id = r.job_id "
        "WHERE r.worker_id = :id",
        id=worker_id,
    )
    return [ClaimedRequest(**row._mapping, holder=worker_id, body=b"") for row in held]


class TestLiveRequests:
    def submit(self, rows: Rows, lines: int = 1) -> UUID:
        job_id = new_id()
        staged = [StagedLine(line, f"live-{line}", 0, b"{}") for line in range(1, lines + 1)]
        with rows.database.begin() as connection:
            live.submit(connection, rows.tenant("caller").id, "demo", staged, job_id, claim=None)
        return job_id

    def take(self, rows: Rows, limit: int, live_limit: int) -> list[tuple[UUID, bool]]:
        worker_id = rows.worker()
        with rows.database.begin() as connection:
            taken = claim(
                connection, worker_id, "demo", limit=limit, live_limit=live_limit, is_idle=True, solo_after_deaths=2
            )
        return [(request.job_id, request.is_live) for request in taken.requests]

    def test_live_request_is_claimed_before_a_batch_of_highest_priority(self, rows: Rows) -> None:
        batch, job_id = rows.job(5, priority=100), self.submit(rows)
        assert self.take(rows, 3, 10) == [(job_id, True), (batch, False), (batch, False)]

    def test_live_request_is_claimed_where_there_is_no_room_for_batches(self, rows: Rows) -> None:
        rows.job(5)
        job_id = self.submit(rows, 4)
        assert self.take(rows, 0, 3) == [(job_id, True)] * 3

    def test_live_job_whose_worker_died_says_so(self, rows: Rows) -> None:
        job_id, worker_id = self.submit(rows), rows.worker()
        with rows.database.begin() as connection:
            assert live.states(connection, [job_id, new_id()]) == {job_id: LiveState(False, False)}
            claim(connection, worker_id, "demo", limit=1, is_idle=True, solo_after_deaths=2)
            assert live.states(connection, [job_id])[job_id] == LiveState(False, False)
            rescue.release_dead_worker(connection, worker_id, max_deaths=3)
            assert live.states(connection, [job_id])[job_id] == LiveState(False, True)
