"""Deliveries as rows: who takes which, and whose word on an attempt stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Row

from jobs.queries import webhooks
from jobs.queries.webhooks import DueDelivery
from tests.support.rows import Rows


def test_delivery_holds_what_its_event_needs(rows: Rows) -> None:
    job_id = rows.job(3, webhook="https://receiver.example/hook")
    rows.finish(job_id)
    (delivery,) = _take(rows)
    assert (delivery.attempt, delivery.url) == (1, "https://receiver.example/hook")
    assert delivery.secrets == [rows.tenant().webhook_secret]
    assert (delivery.job_id, delivery.event_type, delivery.job_state) == (job_id, "job.completed", "completed")
    assert (delivery.model, delivery.metadata) == ("demo", {"made": "for a test"})
    assert (delivery.total, delivery.completed, delivery.failed) == (3, 3, 0)
    assert delivery.taken_at.tzinfo is not None


def test_delivery_is_taken_by_one_courier(rows: Rows) -> None:
    _deliveries(rows, "https://receiver.example", number=3)
    with rows.database.begin() as connection:
        first = webhooks.take_due(connection, limit=2, per_endpoint=9, under_way=[], hold=60)
        # Before the first has committed, and after.
        second = _take(rows)
    assert len(first) == 2
    assert len(second) == 1
    assert _take(rows) == []


def test_delivery_is_due_again_when_its_courier_died(rows: Rows) -> None:
    _deliveries(rows, "https://receiver.example")
    (first,) = _take(rows, hold=0)
    (again,) = _take(rows)
    assert (again.id, again.event_id, again.attempt) == (first.id, first.event_id, 2)


def test_endpoint_gets_no_more_attempts_than_its_limit(rows: Rows) -> None:
    _deliveries(rows, "https://hangs.example", number=6)
    _deliveries(rows, "https://other.example", number=2)
    assert _urls(_take(rows, per_endpoint=4)) == {"https://hangs.example": 4, "https://other.example": 2}
    # What is under way counts.
    _again(rows)
    endpoint_id = rows.query("SELECT id FROM webhook_endpoints WHERE url = 'https://hangs.example'")[0].id
    taken = _take(rows, per_endpoint=4, under_way=[endpoint_id] * 3)
    assert _urls(taken) == {"https://hangs.example": 1, "https://other.example": 2}


def test_places_go_to_the_tenant_with_the_fewest_attempts(rows: Rows) -> None:
    for number in range(4):
        _deliveries(rows, f"https://hangs-{number}.example", tenant="first")
    _deliveries(rows, "https://late.example", tenant="second")
    assert _urls(_take(rows, limit=2)).keys() == {"https://hangs-0.example", "https://late.example"}
    _again(rows)
    hanging = [row.id for row in rows.query("SELECT id FROM webhook_endpoints WHERE url LIKE '%hangs%'")]
    assert _urls(_take(rows, limit=1, under_way=hanging)).keys() == {"https://late.example"}


def test_delivered_attempt_is_the_last(rows: Rows) -> None:
    _deliveries(rows, "https://receiver.example")
    (delivery,) = _take(rows)
    with rows.database.begin() as connection:
        webhooks.mark_delivered(connection, delivery.id, status=204)
    (row,) = _rows(rows)
    assert (row.due_at, row.given_up, row.last_status, row.last_error) == (None, False, 204, None)
    assert row.delivered_at is not None
    # A failure that comes in late changes nothing.
    with rows.database.begin() as connection:
        webhooks.put_off(connection, delivery.id, attempt=1, delay=1, status=500, error="late")
        webhooks.give_up(connection, delivery.id, attempt=1, status=500, error="late", disable=False)
    assert _rows(rows) == [row]


def test_failed_attempt_is_put_off(rows: Rows) -> None:
    _deliveries(rows, "https://receiver.example")
    (delivery,) = _take(rows)
    with rows.database.begin() as connection:
        webhooks.put_off(connection, delivery.id, attempt=1, delay=300, status=500, error="words")
    (row,) = rows.query(
        "SELECT last_status, last_error, extract(epoch FROM due_at - clock_timestamp()) AS delay FROM deliveries"
    )
    assert (row.last_status, row.last_error) == (500, "words")
    assert 290 < row.delay <= 300


def test_late_failure_does_not_overwrite_a_newer_attempt(rows: Rows) -> None:
    _deliveries(rows, "https://receiver.example")
    (first,) = _take(rows, hold=0)
    _take(rows)
    before = _rows(rows)
    with rows.database.begin() as connection:
        webhooks.put_off(connection, first.id, attempt=first.attempt, delay=0, status=500, error="old")
        webhooks.give_up(connection, first.id, attempt=first.attempt, status=500, error="old", disable=False)
    assert _rows(rows) == before
    # But what arrived has arrived.
    with rows.database.begin() as connection:
        webhooks.mark_delivered(connection, first.id, status=200)
    assert _rows(rows)[0].due_at is None


def test_endpoint_is_disabled_when_its_receiver_is_gone_until_it_is_named_anew(rows: Rows) -> None:
    url = "https://gone.example"
    _deliveries(rows, url, number=3)
    _deliveries(rows, "https://other.example")
    first = _take(rows, limit=2)[0]
    assert first.url == url
    with rows.database.begin() as connection:
        webhooks.give_up(connection, first.id, attempt=1, status=410, error="gone", disable=True)
    _again(rows)
    assert _urls(_take(rows)) == {"https://other.example": 1}
    assert len(rows.query("SELECT 1 FROM deliveries WHERE given_up AND last_error = 'gone'")) == 3
    _deliveries(rows, url)
    assert _urls(_take(rows)) == {url: 1}
    rows.check()


def test_ended_job_has_no_delivery_when_its_receiver_is_gone(rows: Rows) -> None:
    job_id = rows.job(1, webhook="https://gone.example")
    rows.execute("UPDATE webhook_endpoints SET disabled_at = clock_timestamp()")
    rows.finish(job_id)
    assert _rows(rows) == []
    rows.check()


def _deliveries(rows: Rows, url: str, *, number: int = 1, tenant: str = "default") -> None:
    for _ in range(number):
        rows.finish(rows.job(1, webhook=url, tenant=tenant))


def _take(
    rows: Rows, *, limit: int = 100, per_endpoint: int = 100, under_way: Sequence[UUID] = (), hold: float = 60
) -> list[DueDelivery]:
    with rows.database.begin() as connection:
        return webhooks.take_due(connection, limit=limit, per_endpoint=per_endpoint, under_way=under_way, hold=hold)


def _again(rows: Rows) -> None:
    """Everything that is not at its end is due once more."""
    rows.execute("UPDATE deliveries SET due_at = clock_timestamp() - interval '1 s' WHERE due_at IS NOT NULL")


def _urls(taken: Sequence[DueDelivery]) -> dict[str, int]:
    return dict(Counter(delivery.url for delivery in taken))


def _rows(rows: Rows) -> list[Row[tuple[object, ...]]]:
    return list(rows.query("SELECT * FROM deliveries ORDER BY id"))
