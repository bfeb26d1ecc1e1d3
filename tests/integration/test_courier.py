"""The courier as the process that it is: `pagemill courier` against real servers, and without them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
from standardwebhooks.webhooks import Webhook

from jobs.database import DatabaseNotConfigured
from jobs.queries import retention, settling
from jobs.queues import COURIER_QUEUE, DRAIN_TASK, NUDGE_TASK, BrokerNotConfigured, model_queue
from jobs.settings import Settings
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE, await_condition
from tests.support.proxies import proxied
from tests.support.receivers import receiver
from tests.support.rows import MODEL, Rows
from worker.app import make_app
from worker.courier import maintenance
from worker.courier.process import run_courier

AT_ONCE = 60.0  # seconds, far less than an interval that keeps the courier waiting
QUICK = {
    "sweep_interval": 0.1,
    "webhook_poll_interval": 0.1,
    "heartbeat_interval": 0.05,
    "webhook_allow_private": True,
    "metrics_port": 0,
}


@dataclass
class Courier:
    """A running courier and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    def says(self, words: str) -> bool:
        return words in self.log.read_text()

    def await_words(self, words: str) -> None:
        def found() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.says(words)

        await_condition(found, f"{words!r} in the courier's log", timeout=PATIENCE)

    def turns(self, task: str) -> int:
        """How many turns of a periodic task went well, read from its metrics."""
        (url,) = re.findall(r"metrics on (\S+)", self.log.read_text())
        found = re.search(rf'courier_turns_total{{task="{task}"}} (\d+)', httpx.get(url).text)
        return int(found[1]) if found else 0

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it. It waits for nothing that takes longer than `AT_ONCE`."""
        self.process.send_signal(how)
        code = self.process.wait(timeout=AT_ONCE)
        assert code == (-signal.SIGKILL if how is signal.SIGKILL else 0), self.log.read_text()


@contextmanager
def courier(tmp_path: Path, database_url: str, redis_url: str, **settings: object) -> Iterator[Courier]:
    """Start `pagemill courier`; it is at work once this yields."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAGEMILL_")}
    chosen = {"database_url": database_url, "redis_url": redis_url} | QUICK | settings
    environment |= {f"PAGEMILL_{name.upper()}": str(value) for name, value in chosen.items()}
    log = tmp_path / f"courier-{time.monotonic_ns()}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "courier"],
            cwd=REPOSITORY,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    running = Courier(process, log)
    try:
        running.await_words("the courier is at work")
        yield running
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_courier_does_all_periodic_maintenance(tmp_path: Path, rows: Rows, redis_url: str) -> None:
    dying, cut_off, late, waiting = rows.job(2), rows.job(30), rows.job(2, window="1h"), rows.job(2)
    upload, deleted, other = rows.job(2, published=False), rows.job(1), rows.job(1)
    rows.execute("INSERT INTO models (name, max_model_len, vocab_size) VALUES ('later', 128, 100)")
    rows.execute("UPDATE jobs SET model = 'later' WHERE id = :id", id=other)
    rows.execute("UPDATE jobs SET priority = 1 WHERE id = :id", id=deleted)
    finisher = rows.worker()
    rows.settle(rows.claim(finisher, limit=1).requests)
    worker_id = rows.worker()
    rows.claim(worker_id, limit=2)
    tenant_id = rows.tenant().id
    with rows.database.begin() as connection:
        assert settling.cancel_job(connection, tenant_id, cut_off) is not None
        assert retention.delete_job(connection, tenant_id, deleted)
    rows.execute("UPDATE jobs SET expires_at = clock_timestamp() WHERE id = :id", id=late)
    rows.execute("UPDATE jobs SET staged_at = clock_timestamp() - interval '1 day' WHERE id = :id", id=upload)
    rows.lapse(worker_id)

    with courier(tmp_path, rows.database_url, redis_url, sweep_chunk=4) as running:
        await_condition(lambda: rows.job_row(cut_off).state == "cancelled", "the cancelled job's end")
        await_condition(lambda: rows.job_row(late).state == "expired", "the late job's end")
        await_condition(lambda: rows.states(dying) == ["pending", "pending"], "the dead worker's requests")
        await_condition(
            lambda: {row.id for row in rows.query("SELECT id FROM jobs")} == {dying, cut_off, late, waiting, other},
            "removal of the upload and of the deleted job",
        )
        # One message lies there, however many turns go by.
        with closing(redis.Redis.from_url(redis_url)) as client:
            await_condition(lambda: client.llen(model_queue(MODEL.name)) == 1, "a notification")
            # A turn goes through the models by name, so it has looked at this one's queue when it refills the other's.
            for _ in range(3):
                client.delete(model_queue("later"))
                await_condition(lambda: client.llen(model_queue("later")) == 1, "a turn")
            assert client.llen(model_queue(MODEL.name)) == 1
            (message,) = client.lrange(model_queue(MODEL.name), 0, -1)
            assert DRAIN_TASK.encode() in message
        running.stop()
    rows.check()


def test_courier_delivers_sooner_when_nudged(tmp_path: Path, rows: Rows, redis_url: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(receiver())
        # The first look at start, and the one that follows a delivery, take the first event.
        rows.finish(rows.job(1, webhook=server.url))
        running = stack.enter_context(
            courier(tmp_path, rows.database_url, redis_url, webhook_poll_interval=600, sweep_interval=600)
        )
        server.await_requests(1)
        await_condition(lambda: not rows.query("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL"), "the outcome")
        await_condition(lambda: running.turns("webhooks") == 2, "both looks")
        job_id = rows.job(1, webhook=server.url)
        rows.finish(job_id)
        app = make_app(Settings(redis_url=redis_url), "test")
        app.send_task(NUDGE_TASK, queue=COURIER_QUEUE)
        _, request = server.await_requests(2)
        event = Webhook(rows.tenant().webhook_secret).verify(request.body, request.headers)
        assert event["data"]["id"] == f"job_{job_id.hex}"
        await_condition(lambda: not rows.query("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL"), "the outcome")
        running.stop()
        log = running.log.read_text()
    # Neither the payload nor the signature or its secret stands in the log.
    assert rows.tenant().webhook_secret not in log
    assert request.headers["webhook-signature"] not in log
    assert "made" not in log
    assert "for a test" not in log


def test_delivery_is_repeated_when_the_courier_is_killed_before_its_commit(
    tmp_path: Path, rows: Rows, redis_url: str
) -> None:
    with receiver((200, {})) as server:
        reply = server.reply
        killed = threading.Event()

        def kill_then_reply() -> tuple[int, dict[str, str]]:
            if not killed.is_set():
                killed.set()
                first.stop(signal.SIGKILL)
            return reply()

        server.reply = kill_then_reply  # type: ignore[method-assign]
        with courier(tmp_path, rows.database_url, redis_url) as first:
            rows.finish(rows.job(1, webhook=server.url))
            server.await_requests(1)
            first.process.wait(PATIENCE)
        (row,) = rows.query("SELECT attempts, delivered_at, due_at > clock_timestamp() AS held FROM deliveries")
        assert tuple(row) == (1, None, True)
        # Its hold runs out.
        rows.execute("UPDATE deliveries SET due_at = clock_timestamp()")
        with courier(tmp_path, rows.database_url, redis_url) as second:
            server.await_requests(2)
            await_condition(lambda: bool(rows.query("SELECT 1 FROM deliveries WHERE due_at IS NULL")), "the outcome")
            second.stop()
    one, again = server.received
    assert one.headers["webhook-id"] == again.headers["webhook-id"]
    assert one.body == again.body
    rows.check()


def test_courier_works_without_redis(tmp_path: Path, rows: Rows, redis_url: str) -> None:
    with proxied(redis_url) as (proxy, url), receiver() as server:
        proxy.down()
        with courier(tmp_path, rows.database_url, url, redis_timeout=0.3) as running:
            # Never there at all.
            rows.finish(rows.job(1, webhook=server.url))
            server.await_requests(1)
            # It comes, and is used.
            proxy.up()
            waiting = rows.job(1)
            with closing(redis.Redis.from_url(redis_url)) as client:
                await_condition(lambda: client.llen(model_queue(MODEL.name)) == 1, "a notification")
                client.flushdb()
                await_condition(lambda: client.llen(model_queue(MODEL.name)) == 1, "a notification after FLUSHALL")
                # It hangs, then dies.
                proxy.hang()
                rows.finish(waiting)
                rows.finish(rows.job(1, webhook=server.url))
                server.await_requests(2)
                proxy.down()
                _worker_dies(rows)
            running.stop()


def test_courier_survives_an_outage_of_postgres(tmp_path: Path, rows: Rows, redis_url: str) -> None:
    with proxied(rows.database_url) as (postgres, database_url), proxied(redis_url) as (broker, broker_url):
        postgres.down()
        with courier(tmp_path, database_url, broker_url, redis_timeout=0.3) as running:
            running.await_words("Postgres is away")
            postgres.up()
            _worker_dies(rows)
            running.await_words("rescue_stalled: works again")
            heard = running.log.read_text().count("Postgres is away")
            postgres.down()
            broker.down()
            await_condition(lambda: running.log.read_text().count("Postgres is away") > heard, "the second outage")
            # Both servers are away now: it stops at once all the same.
            running.stop()
            assert "Traceback" not in running.log.read_text()


def test_courier_reaps_no_living_worker_after_an_outage(tmp_path: Path, rows: Rows, redis_url: str) -> None:
    # No lease could be renewed while Postgres was away: a courier that starts first must not take all workers for dead.
    job_id, worker_id = rows.job(1), rows.worker()
    rows.claim(worker_id)
    rows.lapse(worker_id)
    # From before the courier starts, which takes less than this where the machine is not loaded.
    began = time.monotonic()
    with courier(tmp_path, rows.database_url, redis_url, heartbeat_interval=1.0) as running:
        await_condition(lambda: rows.states(job_id) == ["pending"], "the rescue of its request")
        assert time.monotonic() - began > 1.0 * maintenance.PATIENCE
        running.stop(signal.SIGINT)  # Ctrl-C is no failure


@pytest.mark.parametrize(
    ("missing", "error"), [("database_url", DatabaseNotConfigured), ("redis_url", BrokerNotConfigured)]
)
def test_courier_names_what_it_needs(rows: Rows, redis_url: str, missing: str, error: type[Exception]) -> None:
    urls = {"database_url": rows.database_url, "redis_url": redis_url, missing: None}
    with pytest.raises(error, match=f"PAGEMILL_{missing.upper()}"):
        run_courier(Settings.model_validate(urls))


def _worker_dies(rows: Rows) -> None:
    """A worker falls silent; the courier notices."""
    worker_id = rows.worker()
    rows.lapse(worker_id)
    statement = "SELECT 1 FROM workers WHERE id = :id AND ended_at IS NOT NULL"
    await_condition(lambda: bool(rows.query(statement, id=worker_id)), "reaping of a dead worker")
