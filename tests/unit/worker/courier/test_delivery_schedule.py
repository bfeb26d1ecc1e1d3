"""When a delivery is tried again."""

from __future__ import annotations

import pytest

from jobs.settings import Settings
from worker.courier.delivery import WebhookResponse
from worker.courier.dispatcher import JITTER, next_delay

SCHEDULE = (0, 5, 300)
FAILED = WebhookResponse(500, "failed")


def test_retry_schedule_is_that_of_standard_webhooks() -> None:
    hours = 3600
    assert Settings().webhook_schedule == (
        *(0, 5, 300, 1800),
        *(hour * hours for hour in (2, 5, 10, 14, 20, 24)),
    )


@pytest.mark.parametrize(("attempt", "delay"), [(1, 5), (2, 300), (3, None), (4, None)])
def test_attempt_has_its_delay_and_the_last_has_none(attempt: int, delay: float | None) -> None:
    assert next_delay(SCHEDULE, attempt, FAILED, spread=0) == delay


def test_jitter_goes_either_way() -> None:
    assert next_delay(SCHEDULE, 2, FAILED, spread=JITTER) == pytest.approx(360)
    assert next_delay(SCHEDULE, 2, FAILED, spread=-JITTER) == pytest.approx(240)


def test_retry_after_lengthens_a_delay_and_never_shortens_it() -> None:
    assert next_delay(SCHEDULE, 1, WebhookResponse(429, "busy", retry_after=60), spread=0) == 60
    assert next_delay(SCHEDULE, 2, WebhookResponse(429, "busy", retry_after=60), spread=0) == 300
    assert next_delay(SCHEDULE, 3, WebhookResponse(429, "busy", retry_after=60), spread=0) is None
