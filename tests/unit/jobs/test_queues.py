"""Settings decide which broker carries notifications."""

from __future__ import annotations

import pytest

from jobs.settings import Settings
from worker.app import make_app


@pytest.mark.parametrize("name", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"])
def test_celery_variables_do_not_move_the_broker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "redis://elsewhere:1/0")
    app = make_app(Settings(redis_url="redis://here:2/3"), "test")
    for connection in (app.connection_for_read(), app.connection_for_write()):
        assert connection.hostname == "here"
