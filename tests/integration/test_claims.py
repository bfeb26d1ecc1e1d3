"""The claim loop, the writer and the heartbeat over a real Postgres, with an engine that only says what it holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from uuid import UUID

import pytest
from sqlalchemy.exc import OperationalError

from jobs.ids import new_id
from jobs.queries import settling, workers
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.demand import Demand
from jobs.queries.settling import ClaimToken
from jobs.queries.workers import WorkerIdentity
from jobs.requests import ModelLimits
from jobs.settings import Settings
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import MODEL, Rows, answered
from worker.generation import claim_loop as claim_loop_module
from worker.generation import heartbeat as heartbeat_module
from worker.generation import lease as lease_module
from worker.generation import writer as writer_module
from worker.generation.claim_loop import MOST_UNWRITTEN, ClaimLoop
from worker.generation.heartbeat import Heartbeat
from worker.generation.lease import Lease
from worker.generation.turns import Turns
from worker.generation.writer import Writer


@dataclass
class Consumer:
    """Takes what it is given, and finishes nothing."""

    places: int = 0
    requests: list[ClaimedRequest] = field(default_factory=list)
    polls: int = 0
    names: Sequence[str] = (MODEL.name,)
    present: str | None = MODEL.name
    switches: list[str] = field(default_factory=list)
    on_poll: Callable[[], None] = lambda: None

    def free_capacity(self) -> int:
        self.polls += 1
        self.on_poll()
        return self.places - len(self.requests)

    def live_capacity(self) -> int:
        return 0

    def switch_to(self, model: str) -> None:
        self.present = None
        self.switches.append(model)

    def held(self) -> Sequence[ClaimedRequest]:
        return list(self.requests)

    def submit(self, requests: Sequence[ClaimedRequest]) -> Sequence[ClaimedRequest]:
        self.requests.extend(requests)
        return ()

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        self.requests = [request for request in self.requests if request not in requests]


def on_crash(error: BaseException) -> None:
    raise error


def lease_of(worker_id: UUID) -> Lease:
    lease = Lease(fence_after=60)
    lease.take(worker_id, time.monotonic())
    return lease


def claim_loop(
    rows: Rows, lease: Lease, consumer: Consumer, unwritten: Collection[ClaimToken] = (), turns: Turns | None = None
) -> ClaimLoop:
    settings = Settings(poll_interval=0.05)
    return ClaimLoop(
        rows.database,
        lease,
        settings,
        consumer=consumer,
        turns=turns,
        unwritten=lambda: unwritten,
        on_crash=on_crash,
    )


def test_unknown_claims_of_a_worker_are_released(rows: Rows) -> None:
    job_id, worker_id = rows.job(5), rows.worker()
    claimed = rows.claim(worker_id).requests  # committed; of lines 3 to 5 the worker never heard
    loop = claim_loop(rows, lease_of(worker_id), Consumer(0, [claimed[0]]), {claimed[1].token})
    loop.start()
    await_condition(lambda: rows.states(job_id)[2:] == ["pending"] * 3, "the return of what was never seen")
    loop.close()
    # One is in the engine and one with the writer: both stay.
    assert rows.states(job_id)[:2] == ["running", "running"]
    assert {row.deaths for row in rows.query("SELECT deaths FROM requests")} == {0}
    rows.check()


def test_claim_loop_pauses_when_too_many_results_are_unwritten(rows: Rows) -> None:
    job_id, worker_id = rows.job(2), rows.worker()
    unwritten = {ClaimToken(job_id, -line, 1, worker_id) for line in range(MOST_UNWRITTEN)}
    consumer = Consumer(10)
    loop = claim_loop(rows, lease_of(worker_id), consumer, unwritten)
    loop.start()
    await_condition(lambda: consumer.polls >= 4, "three whole polls")
    assert not consumer.requests
    unwritten.pop()
    await_condition(lambda: len(consumer.requests) == 2, "claims of one at a time, as there is place")
    loop.close()


class BothAtOnce(Turns):
    """Lets no worker turn before both have looked at what waits."""

    def __init__(self, both: threading.Barrier) -> None:
        super().__init__([MODEL.name, "other"], switch_after=60, cost=lambda model: 2.0)
        self._both = both

    def following(self, present: str, demands: Mapping[str, Demand]) -> str | None:
        found = super().following(present, demands)
        self._both.wait(PATIENCE)
        return found


def test_of_two_idle_workers_that_look_at_once_one_turns_to_a_model(rows: Rows) -> None:
    other = ModelLimits("other", 128, 100)
    job_id = rows.job(2)
    consumers, both = [], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        looks = []
        for number in range(2):
            worker = WorkerIdentity(new_id(), host="test", pid=number, device="cpu")
            with rows.database.begin() as connection:
                workers.register(connection, worker, MODEL, others=[other], lease=60)
            consumers.append(Consumer(10, names=(MODEL.name, "other")))
            rows.execute("UPDATE jobs SET model = 'other' WHERE id = :id", id=job_id)
            loop = claim_loop(rows, lease_of(worker.id), consumers[-1], turns=BothAtOnce(both))
            looks.append(pool.submit(loop._claim))
        assert [look.result() for look in looks] == [0, 0]
    assert sorted(consumer.switches for consumer in consumers) == [[], ["other"]]
    assert sorted(row.model for row in rows.query("SELECT model FROM workers")) == [MODEL.name, "other"]


def test_suspect_is_claimed_only_when_everything_is_written(rows: Rows) -> None:
    job_id, worker_id = rows.job(1), rows.worker()
    rows.execute("UPDATE requests SET deaths = 2")
    unwritten = {ClaimToken(job_id, -1, 1, worker_id)}
    consumer = Consumer(10)
    loop = claim_loop(rows, lease_of(worker_id), consumer, unwritten)
    assert loop._claim() == 0
    unwritten.clear()
    assert loop._claim() == 1


def test_requests_of_a_cancelled_job_are_aborted(rows: Rows) -> None:
    cancelled, kept, worker_id = rows.job(3), rows.job(2), rows.worker()
    consumer = Consumer(0, list(rows.claim(worker_id).requests))
    loop = claim_loop(rows, lease_of(worker_id), consumer)
    with rows.database.begin() as connection:
        assert settling.cancel_job(connection, rows.tenant().id, cancelled) is not None
    rows.settle_due()
    loop._reconcile_claims()
    assert [request.job_id for request in consumer.requests] == [kept, kept]


def test_claims_are_reconciled_once_a_poll_and_after_news(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    now, times = 100.0, 0

    def reconcile() -> None:
        nonlocal times
        times += 1

    loop = claim_loop(rows, lease_of(rows.worker()), Consumer())
    monkeypatch.setattr(claim_loop_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(loop, "_reconcile_claims", reconcile)
    loop._reconcile_where_due()
    loop._reconcile_where_due()
    assert times == 1
    loop.claim_again_if_more()
    loop._reconcile_where_due()
    assert times == 1
    loop.notify()
    loop._reconcile_where_due()
    assert times == 2
    now += 0.1  # more than the poll's interval
    loop._reconcile_where_due()
    assert times == 3


def test_claims_are_reconciled_after_an_error(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transaction may have been committed."""
    monkeypatch.setattr(claim_loop_module, "time", SimpleNamespace(monotonic=lambda: 100.0))  # no other poll is due
    job_id, worker_id = rows.job(2), rows.worker()
    consumer = Consumer(10)
    loop = claim_loop(rows, lease_of(worker_id), consumer)

    def lose_the_answer() -> None:
        if consumer.polls == 1:
            rows.claim(worker_id)
            raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    consumer.on_poll = lose_the_answer
    loop.start()
    await_condition(lambda: len(consumer.requests) == 2, "another claim of what was given back")
    loop.close()
    assert {request.epoch for request in consumer.requests} == {2}
    assert rows.states(job_id) == ["running"] * 2


def test_claim_loop_adds_nothing_to_a_solo_request(rows: Rows) -> None:
    suspect, worker_id = rows.job(1), rows.worker()
    rows.execute("UPDATE requests SET deaths = 2")
    consumer = Consumer(10)
    loop = claim_loop(rows, lease_of(worker_id), consumer)
    assert loop._claim() == 1
    others = rows.job(3)
    assert loop._claim() == 0
    assert [request.job_id for request in consumer.requests] == [suspect]
    consumer.requests.clear()
    assert loop._claim() == 3
    assert {request.job_id for request in consumer.requests} == {others}


def test_claims_made_while_the_worker_stops_are_released(rows: Rows) -> None:
    job_id, worker_id = rows.job(3), rows.worker()
    consumer = Consumer(10)
    loop = claim_loop(rows, lease_of(worker_id), consumer)
    consumer.on_poll = loop.stop  # after the look at what there is to do, and before the claim
    loop.start()
    loop.close()
    assert [row.epoch for row in rows.query("SELECT epoch FROM requests")] == [1] * 3  # they were claimed
    assert rows.states(job_id) == ["pending"] * 3
    assert not consumer.requests
    rows.check()


def test_claim_loop_claims_nothing_without_a_good_lease(rows: Rows) -> None:
    rows.job(1)
    lease = Lease(fence_after=60)
    lease.take(rows.worker(), time.monotonic() - 61)
    consumer = Consumer(10)
    loop = claim_loop(rows, lease, consumer)
    assert loop._claim() == 0
    assert lease.worker_id is not None
    lease.take(lease.worker_id, time.monotonic())
    assert loop._claim() == 1


def test_lease_counts_from_before_the_heartbeat_was_sent(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(heartbeat_module, "time", clock)
    monkeypatch.setattr(lease_module, "time", clock)

    def stats() -> dict[str, object]:
        """Asked for within the second heartbeat, which takes five seconds and is the last."""
        nonlocal now
        now += 5
        heartbeat.stop_beating()
        return {"heartbeat": "second"}

    lease = Lease(fence_after=20)
    heartbeat = Heartbeat(
        rows.database,
        lease,
        Settings(heartbeat_interval=0.01),
        device="cpu",
        turn=lambda: MODEL.name,
        stats=stats,
        on_change=lambda: None,
        on_wanted=lambda wanted: None,
        on_crash=on_crash,
    )
    heartbeat.start([MODEL])
    assert heartbeat.thread is not None
    heartbeat.thread.join(PATIENCE)
    assert [row.stats for row in rows.query("SELECT stats FROM workers")] == [{"heartbeat": "second"}]
    now = 119.9
    assert lease.is_good
    now = 120.0
    assert not lease.is_good


def test_ended_lease_is_not_renewed(rows: Rows) -> None:
    worker_id = rows.worker()
    lease = lease_of(worker_id)
    assert lease.end() == worker_id
    lease.take(worker_id, time.monotonic())  # a heartbeat that was under way
    assert lease.worker_id is None
    assert not lease.is_good


def test_writer_writes_at_once_when_no_other_result_can_come(rows: Rows) -> None:
    job_id, worker_id = rows.job(3), rows.worker()
    writer = Writer(rows.database, lease_of(worker_id), interval=1000 * PATIENCE, on_crash=on_crash)
    writer.start()
    for request in rows.claim(worker_id).requests:
        writer.put(answered(request))
    writer.flush_soon()
    assert writer.flush(timeout=PATIENCE)
    assert rows.states(job_id) == ["completed"] * 3
    assert writer.close(timeout=PATIENCE)


def test_results_count_as_unwritten_until_committed(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_AFTER", 0.01)
    job_id, worker_id = rows.job(2), rows.worker()
    claimed = rows.claim(worker_id).requests
    in_flight = threading.Event()

    class WatchedLease(Lease):
        @property
        def is_good(self) -> bool:
            in_flight.set()  # the writer asks once a group is on its way
            return super().is_good

    lease = WatchedLease(fence_after=60)
    writer = Writer(rows.database, lease, interval=0.001, on_crash=on_crash)
    for request in claimed:
        writer.put(answered(request))
    writer.start()
    assert in_flight.wait(PATIENCE)
    assert writer.unwritten() == {request.token for request in claimed}
    assert rows.states(job_id) == ["running"] * 2  # without a good lease nothing is written
    lease.take(worker_id, time.monotonic())
    assert writer.flush(timeout=PATIENCE)
    assert writer.unwritten() == set()
    assert rows.states(job_id) == ["completed"] * 2
    assert writer.close(timeout=PATIENCE)


def test_writer_splits_large_results_into_several_statements(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, worker_id = rows.job(20), rows.worker()
    outcomes = [answered(request) for request in rows.claim(worker_id).requests]
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 3 * len(outcomes[0].body))
    writer = Writer(rows.database, lease_of(worker_id), interval=0.001, on_crash=on_crash)
    for outcome in outcomes:
        writer.put(outcome)
    assert len(writer.unwritten()) == 20
    writer.start()
    assert writer.flush(timeout=PATIENCE)
    assert writer.unwritten() == set()
    assert rows.states(job_id) == ["completed"] * 20
    assert len({row.xmin for row in rows.query("SELECT xmin::text FROM results")}) == 7
    assert writer.close(timeout=PATIENCE)
    rows.check()
