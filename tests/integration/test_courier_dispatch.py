"""From rows to receivers and back: retries, endings, and receivers that do not hold up others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Row
from standardwebhooks.webhooks import Webhook

from jobs.database import connect
from jobs.settings import Settings
from tests.support.processes import PATIENCE, await_condition
from tests.support.proxies import proxied
from tests.support.receivers import black_hole, raw_receiver, receiver
from tests.support.rows import Rows
from worker.courier import dispatcher as dispatch
from worker.courier.addresses import AddressPolicy
from worker.courier.dispatcher import Dispatcher
from worker.courier.metrics import CourierMetrics
from worker.courier.periodic import Periodic


@contextmanager
def dispatching(
    database_url: str, *, allow_private: bool = True, metrics: CourierMetrics | None = None, **settings: object
) -> Iterator[Dispatcher]:
    """A courier's deliveries, with a quick schedule unless told otherwise."""
    options = {"webhook_schedule": (0, 0.05, 0.05), "webhook_timeout": 60.0, "database_url": database_url}
    chosen = Settings.model_validate(options | settings)
    database = connect(chosen, "pagemill tests")
    dispatcher = Dispatcher(
        database,
        chosen,
        AddressPolicy(allow_private=allow_private),
        metrics or CourierMetrics(),
        on_free=lambda: timer.wake(),
    )
    timer = Periodic("webhooks", dispatcher.turn, interval=0.05)
    timer.start()
    try:
        yield dispatcher
    finally:
        timer.stop()
        timer.join(PATIENCE)
        dispatcher.wait(PATIENCE)
        database.dispose()


def end_jobs(rows: Rows, url: str, number: int = 1, tenant: str = "default") -> None:
    for _ in range(number):
        rows.finish(rows.job(1, webhook=url, tenant=tenant))


def delivery(rows: Rows) -> Row[tuple[object, ...]]:
    (row,) = rows.query("SELECT * FROM deliveries")
    return row


def await_end(rows: Rows, number: int = 1) -> None:
    """Until so many deliveries are delivered or given up."""
    statement = "SELECT 1 FROM deliveries WHERE due_at IS NULL"
    await_condition(lambda: len(rows.query(statement)) >= number, f"end of {number} deliveries")


def test_delivery_is_recorded_when_its_event_arrives(rows: Rows) -> None:
    with receiver() as server, dispatching(rows.database_url):
        end_jobs(rows, server.url)
        await_end(rows)
    (request,) = server.received
    event = Webhook(rows.tenant().webhook_secret).verify(request.body, request.headers)
    assert event["type"] == "job.completed"
    row = delivery(rows)
    assert (row.attempts, row.last_status, row.last_error, row.given_up) == (1, 204, None, False)
    rows.check()


def test_failed_delivery_is_retried_under_the_same_id(rows: Rows) -> None:
    with receiver((500, {}), (302, {"location": "http://169.254.169.254/"}), (200, {})) as server:
        end_jobs(rows, server.url)
        with dispatching(rows.database_url):
            await_end(rows)
    assert len(server.received) == 3
    assert len({request.headers["webhook-id"] for request in server.received}) == 1
    assert len({request.body for request in server.received}) == 1
    secret = Webhook(rows.tenant().webhook_secret)
    for request in server.received:
        secret.verify(request.body, request.headers)
    assert delivery(rows).attempts == 3
    rows.check()


def test_delivery_is_given_up_after_the_last_attempt(rows: Rows) -> None:
    with receiver((500, {})) as server:
        end_jobs(rows, server.url)
        metrics = CourierMetrics()
        with dispatching(rows.database_url, metrics=metrics):
            await_end(rows)
    assert len(server.received) == 3
    outcomes = {
        outcome: metrics.registry.get_sample_value("pagemill:webhook_attempts_total", {"outcome": outcome})
        for outcome in ("delivered", "retry", "given_up")
    }
    assert outcomes == {"delivered": 0, "retry": 2, "given_up": 1}
    assert metrics.registry.get_sample_value("pagemill:webhook_attempt_seconds_count") == 3
    row = delivery(rows)
    assert (row.given_up, row.attempts, row.last_status) == (True, 3, 500)
    assert row.last_error == "the receiver answered 500"
    rows.check()


def test_retry_after_moves_the_next_attempt(rows: Rows) -> None:
    with receiver((429, {"retry-after": "3600"})) as server:
        end_jobs(rows, server.url)
        with dispatching(rows.database_url):
            await_condition(lambda: delivery(rows).last_status == 429, "the answer in the row")
    (row,) = rows.query("SELECT extract(epoch FROM due_at - clock_timestamp()) AS delay FROM deliveries")
    assert 3500 < row.delay <= 3600


def test_status_410_ends_all_deliveries_of_the_endpoint(rows: Rows) -> None:
    with receiver((410, {})) as gone, receiver() as other:
        end_jobs(rows, gone.url, 12)
        end_jobs(rows, other.url)
        with dispatching(rows.database_url, webhook_concurrency=8):
            await_end(rows, 13)
    # At most as many as were under way at once.
    assert 1 <= len(gone.received) <= 2
    assert len(other.received) == 1
    assert len(rows.query("SELECT 1 FROM deliveries WHERE given_up")) == 12
    assert len(rows.query("SELECT 1 FROM webhook_endpoints WHERE disabled_at IS NOT NULL")) == 1
    rows.check()


def test_private_address_is_refused_at_once_and_says_why(rows: Rows) -> None:
    with receiver() as server:
        end_jobs(rows, server.url)
        with dispatching(rows.database_url, allow_private=False):
            await_end(rows)
    assert server.received == []
    row = delivery(rows)
    assert (row.given_up, row.attempts) == (True, 1)
    assert row.last_error == "webhooks may not reach 127.0.0.1: loopback address"


def test_unresponsive_receiver_delays_no_other_endpoint(rows: Rows) -> None:
    with (
        receiver() as good,
        dispatching(rows.database_url, webhook_concurrency=4, webhook_timeout=3600.0),
        raw_receiver(black_hole) as hole,
    ):
        end_jobs(rows, hole.url, 10)
        await_condition(lambda: hole.accepted == 1, "the black hole's only place")
        end_jobs(rows, good.url, 10)
        good.await_requests(10)
        assert hole.accepted == 1


def test_black_holes_of_one_tenant_delay_another_by_at_most_one_attempt(rows: Rows) -> None:
    with raw_receiver(black_hole) as hole, receiver() as good:
        for number in range(8):
            end_jobs(rows, f"{hole.url}/{number}", 2, tenant="hanging")
        with dispatching(rows.database_url, webhook_concurrency=4, webhook_timeout=3.0):
            await_condition(lambda: hole.accepted == 4, "every place taken")
            end_jobs(rows, good.url, 3, tenant="other")
            good.await_requests(3)
            # Twelve more wait, and each of the first four is due again: at most one round of them went before.
            assert hole.accepted <= 8


def test_attempts_are_bounded(rows: Rows) -> None:
    with (
        dispatching(rows.database_url, webhook_concurrency=2, webhook_timeout=3600.0) as dispatcher,
        raw_receiver(black_hole) as hole,
    ):
        for number in range(6):
            end_jobs(rows, f"{hole.url}/{number}")
        await_condition(lambda: hole.accepted == 2, "two attempts")
        dispatcher.turn(threading.Event())
    # A turn takes deliveries before it returns.
    (row,) = rows.query("SELECT sum(attempts) AS attempts FROM deliveries")
    assert row.attempts == 2


def test_outcome_is_written_when_postgres_is_back(rows: Rows) -> None:
    with proxied(rows.database_url) as (proxy, url), receiver((200, {})) as server:
        reply = server.reply

        def lose_postgres() -> tuple[int, dict[str, str]]:
            proxy.down()
            threading.Timer(0.3, proxy.up).start()
            return reply()

        server.reply = lose_postgres  # type: ignore[method-assign]
        end_jobs(rows, server.url)
        with dispatching(url):
            await_end(rows)
    assert len(server.received) == 1
    assert delivery(rows).last_status == 200


def test_exception_in_an_attempt_fails_that_attempt_alone(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = dispatch.attempt
    calls: list[int] = []

    def broken_once(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("a bug")
        return real(*arguments, **options)

    monkeypatch.setattr(dispatch, "attempt", broken_once)
    with receiver() as server:
        end_jobs(rows, server.url)
        with dispatching(rows.database_url):
            await_end(rows)
    assert delivery(rows).attempts == 2
