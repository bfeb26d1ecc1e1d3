"""Two couriers, ten workers and a minute in which workers are killed, frozen and started anew."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.oracle import check
from tests.support.processes import await_condition
from tests.support.service import Service

WORKERS = 10
CHAOS = 60.0  # seconds
LINES = 400
# Nothing is given up, however often its workers die here.
PATIENT = {"PAGEMILL_MAX_DEATHS": "1000", "PAGEMILL_SOLO_AFTER_DEATHS": "1000"}


def record_claims(service: Service) -> None:
    """Have Postgres itself note each claim and each other end of one, in the order in which they happen to a row."""
    with service.database.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE moves (id bigserial, job_id uuid, line int, old_state text, new_state text, old_epoch int, "
            "  new_epoch int, old_worker uuid, new_worker uuid);"
            "CREATE FUNCTION note_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "  INSERT INTO moves (job_id, line, old_state, new_state, old_epoch, new_epoch, old_worker, new_worker) "
            "  VALUES (NEW.job_id, NEW.line, OLD.state, NEW.state, OLD.epoch, NEW.epoch, OLD.worker_id, "
            "    NEW.worker_id); "
            "  RETURN NULL; END $$;"
            "CREATE TRIGGER note_move AFTER UPDATE ON requests FOR EACH ROW EXECUTE FUNCTION note_move()"
        )


def check_claims(service: Service) -> int:
    """Every claim took a request that waited, under the next epoch. Returns how many claims there were."""
    for violations in (
        "SELECT * FROM moves WHERE new_state = 'running' AND old_state <> 'pending'",
        "SELECT * FROM moves WHERE new_epoch <> old_epoch + (new_state = 'running')::int",
        "SELECT job_id FROM moves WHERE new_state = 'running' GROUP BY job_id, line, new_epoch HAVING count(*) > 1",
        "SELECT job_id FROM moves WHERE new_state = 'completed' GROUP BY job_id, line HAVING count(*) > 1",
    ):
        assert service.query(violations) == [], violations
    [claims] = service.query("SELECT count(*) AS n FROM moves WHERE new_state = 'running'")
    return int(claims.n)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_jobs_and_webhooks_survive_random_kills_and_freezes(database_url: str, redis_url: str, tmp_path: Path) -> None:
    rng = random.Random(13)
    work = [[1 + line % 40, 5, 7, line % 30] for line in range(LINES)]
    with (
        contextlib.ExitStack() as stack,
        contextlib.closing(Service(database_url, redis_url, tmp_path, PATIENT)) as service,
    ):
        record_claims(service)
        client = stack.enter_context(service.api())
        couriers = [stack.enter_context(service.courier()) for _ in range(2)]

        def start() -> subprocess.Popen[bytes]:
            process = service.start_worker(FAKE_STEP_SECONDS="0.05")
            stack.callback(end, process)
            return process

        def end(process: subprocess.Popen[bytes]) -> None:
            process.kill()
            process.wait()

        workers = [start() for _ in range(WORKERS)]
        await_condition(lambda: len(service.live_workers()) == WORKERS, "ten workers", timeout=300)
        jobs = [service.accepted(client, work)]
        frozen: set[subprocess.Popen[bytes]] = set()
        deaths = thaws = 0
        ends_at = time.monotonic() + CHAOS
        while time.monotonic() < ends_at or not deaths or not thaws:
            place = rng.randrange(WORKERS)
            process = workers[place]
            if process in frozen:
                process.send_signal(signal.SIGCONT)
                frozen.remove(process)
                thaws += 1
            elif rng.random() < 0.5:
                process.send_signal(signal.SIGSTOP)
                frozen.add(process)
            else:
                # Some without warning, some in the middle of their last results.
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
                await_condition(lambda ended=process: ended.poll() is not None, "a worker's end")  # type: ignore[misc]
                workers[place] = start()
                deaths += 1
            if sum(service.states(jobs[-1]).values()) - service.states(jobs[-1]).get("completed", 0) < LINES / 2:
                jobs.append(service.accepted(client, work))
            check(service.database_url)
            check_claims(service)
            time.sleep(rng.uniform(0, 0.6))
        for process in frozen:
            process.send_signal(signal.SIGCONT)
        for job_id in jobs:
            service.await_completion(client, job_id, work, timeout=300)
        assert [courier.poll() for courier in couriers] == [None, None]
        claims = check_claims(service)
        # The chaos was real: work was taken away and claimed again.
        assert claims > len(jobs) * LINES
        # No claim is left.
        assert service.query("SELECT 1 FROM requests WHERE state NOT IN ('completed')") == []
