"""Wall clocks that are an hour wrong: what decides is Postgres' clock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import shifted_clock
from tests.support.oracle import check
from tests.support.processes import await_condition
from tests.support.service import Service

HOUR = 3600


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("api_is_off_by", [HOUR, -HOUR], ids=["api ahead", "api behind"])
def test_service_keeps_time_by_postgres_when_clocks_are_an_hour_off(
    database_url: str, redis_url: str, tmp_path: Path, api_is_off_by: int
) -> None:
    library = shifted_clock.build(tmp_path)
    # A lease that a busy machine does not use up, and yet far less than an hour.
    clocks = {"PAGEMILL_LEASE": "20", "PAGEMILL_FENCE_AFTER": "15", "PAGEMILL_HEARTBEAT_INTERVAL": "1"}
    work = [[1 + line % 40, 5, 7, line % 30] for line in range(600)]
    with (
        contextlib.closing(Service(database_url, redis_url, tmp_path, clocks)) as service,
        service.api(**shifted_clock.environment(library, api_is_off_by)) as client,
        service.courier(),
        service.worker(FAKE_STEP_SECONDS="0.05", **shifted_clock.environment(library, HOUR)) as ahead,
    ):
        [ahead_id] = service.live_workers()
        with service.worker(FAKE_STEP_SECONDS="0.05", **shifted_clock.environment(library, -HOUR)) as behind:
            both = service.live_workers()
            # A window that is over at once, or never, where the API's clock had a say.
            job_id = service.accepted(client, work, completion_window="1h")
            service.wait_for_results(job_id, 200)
            assert service.live_workers() == both
            assert service.query("SELECT count(DISTINCT worker_id) AS n FROM requests WHERE state = 'running'") == [
                (2,)
            ]
            ahead.kill()
            ahead.wait()
            # Neither an hour late nor at once: what the other still holds stays with it.
            await_condition(lambda: ahead_id not in service.live_workers(), "the end of the lease of the one ahead")
            assert service.live_workers() == both - {ahead_id}
            service.await_completion(client, job_id, work)
            assert behind.poll() is None
        charged = service.query("SELECT count(*) AS n FROM requests WHERE deaths > 0 AND epoch = 2")
        again = service.query("SELECT count(*) AS n FROM requests WHERE deaths > 0 OR epoch > 1")
        assert charged == again != [(0,)]
        [window] = service.query("SELECT expires_at - in_progress_at AS open, now() - in_progress_at AS age FROM jobs")
        assert round(window.open.total_seconds()) == HOUR
        assert 0 < window.age.total_seconds() < HOUR
        check(service.database_url)


def test_shifted_clock_shifts_python_s_clocks(tmp_path: Path) -> None:
    shifted = os.environ | shifted_clock.environment(shifted_clock.build(tmp_path), HOUR)
    code = "import time, datetime as d; print(time.time(), d.datetime.now().timestamp())"
    before = time.time()
    told = subprocess.run([sys.executable, "-c", code], env=shifted, capture_output=True, check=True, text=True).stdout
    assert all(before + HOUR <= float(seconds) < before + HOUR + 600 for seconds in told.split())
