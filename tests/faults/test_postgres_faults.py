"""Postgres that dies, hangs, loses its answers and runs out of disk, under the whole service."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from cli.supervisor import RestartPolicy, Supervisor
from migrations.run import upgrade
from tests.support.oracle import check
from tests.support.processes import PATIENCE, await_condition
from tests.support.proxies import proxied
from tests.support.service import Service, all_jobs, job_id_of
from tests.support.small_disk import services_on_a_small_disk

pytestmark = [pytest.mark.slow, pytest.mark.faults]

MIB = 1 << 20


def prompts(count: int) -> list[list[int]]:
    return [[1 + line % 40, 5, 7, line % 30] for line in range(count)]


@contextlib.contextmanager
def postgres_of_its_own(directory: Path, *, down: float) -> Iterator[tuple[str, Supervisor]]:
    """A durable server that may be killed, and stays away for `down` seconds each time."""
    policy = RestartPolicy(first_delay=down, longest_delay=down)
    with (
        contextlib.closing(ChildLog(directory / "logs")) as log,
        embedded_services(DataDir(directory / "data"), log, valkey=False, restart=policy) as services,
    ):
        assert services.database_url is not None
        yield migrated(services.database_url), services.supervisor


def migrated(database_url: str) -> str:
    upgrade(database_url)
    return database_url


def test_job_is_only_paused_when_postgres_is_killed(redis_url: str, tmp_path: Path) -> None:
    # Clocks as they are by default, and an outage that is longer than the lease.
    clocks = {"PAGEMILL_LEASE": "30", "PAGEMILL_FENCE_AFTER": "20", "PAGEMILL_HEARTBEAT_INTERVAL": "5"}
    down, work = 35.0, prompts(1500)
    with (
        postgres_of_its_own(tmp_path, down=down) as (database_url, supervisor),
        contextlib.closing(Service(database_url, redis_url, tmp_path, clocks)) as service,
        service.api() as client,
        service.courier() as courier,
        service.worker(FAKE_STEP_SECONDS="0.05") as worker,
    ):
        job_id = service.accepted(client, work)
        service.wait_for_results(job_id, 100)
        memory = psutil.Process(worker.pid).memory_info().rss
        os.kill(supervisor.pids()["postgres"], signal.SIGKILL)
        killed = time.monotonic()
        await_condition(lambda: "postgres" not in supervisor.pids(), "the end of Postgres")
        refused = 0
        while time.monotonic() - killed < down - 5:
            for response in (client.get(f"/v1/jobs/job_{job_id.hex}"), service.post(client, prompts(1))):
                assert response.status_code == 503, response.text
                assert response.json()["error"]["code"] == "unavailable"
                assert response.headers["retry-after"]
                refused += 1
            assert client.get("/healthz").is_success
            # What it keeps is what it had claimed: it cannot claim more.
            assert psutil.Process(worker.pid).memory_info().rss - memory < 64 * MIB
            time.sleep(0.5)
        assert refused > 10
        service.await_completion(client, job_id, work)
        assert (worker.poll(), courier.poll()) == (None, None)
        # No lease could be renewed during the outage, and no request is charged for it.
        assert service.query("SELECT max(deaths) AS deaths, max(epoch) AS epochs FROM requests") == [(0, 1)]
        assert len(service.query("SELECT 1 FROM jobs")) == 1
        service.await_completion(client, service.accepted(client, prompts(10)), prompts(10))


def test_worker_is_fenced_when_postgres_is_a_black_hole(database_url: str, redis_url: str, tmp_path: Path) -> None:
    work = prompts(400)
    with (
        proxied(database_url) as (proxy, through),
        contextlib.closing(Service(database_url, redis_url, tmp_path)) as service,
        service.api() as client,
        service.courier(),
        service.worker(PAGEMILL_DATABASE_URL=through, FAKE_STEP_SECONDS="0.1") as cut_off,
    ):
        job_id = service.accepted(client, work)
        service.wait_for_results(job_id, 1)
        [cut_off_id] = service.live_workers()
        proxy.hang()
        await_condition(lambda: cut_off_id not in service.live_workers(), "the end of its lease")
        check(service.database_url)
        with service.worker():
            service.await_completion(client, job_id, work)
            before = service.results(job_id)
            # What it said into the hole arrives only now.
            proxy.up()
            await_condition(lambda: len(service.live_workers()) == 2, "the new life of the worker that was cut off")
            service.await_completion(client, service.accepted(client, work), work)
        assert service.results(job_id) == before
        cut_off.send_signal(signal.SIGTERM)
        assert cut_off.wait(PATIENCE) == 0
        check(service.database_url)


def test_commit_is_repeated_without_effect_when_its_answer_is_lost(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    work = prompts(400)
    with (
        proxied(database_url) as (proxy, through),
        contextlib.closing(Service(database_url, redis_url, tmp_path)) as service,
        service.api() as client,
        service.courier(),
        service.worker(PAGEMILL_DATABASE_URL=through, FAKE_STEP_SECONDS="0.02") as worker,
    ):
        proxy.lose_commits(every=3)
        log = tmp_path / "worker.log"
        for _ in range(20):
            service.await_completion(client, service.accepted(client, work), work)
            if "were not wanted any more" in log.read_text() and "whose answer was lost" in log.read_text():
                break
        # A group of results that was written before, and a claim that the worker never heard of.
        assert "were not wanted any more" in log.read_text()
        assert "whose answer was lost" in log.read_text()
        assert proxy.lost > 2
        proxy.lose_commits(every=0)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE) == 0
        assert service.states(service.accepted(client, work)) == {"pending": len(work)}
        check(service.database_url)


def test_service_refuses_writes_and_recovers_when_the_disk_is_full(tmp_path: Path) -> None:
    work = prompts(300)
    bulk = [[1 + line % 40] * 100 for line in range(300)]
    with (
        services_on_a_small_disk(tmp_path, size=256 * MIB) as disk,
        contextlib.closing(Service(migrated(disk.database_url), disk.redis_url, tmp_path)) as service,
        service.api() as client,
        service.courier() as courier,
        service.worker(FAKE_STEP_SECONDS="0.1") as worker,
    ):
        accepted = {service.accepted(client, work): work}
        service.wait_for_results(next(iter(accepted)), 1)
        disk.fill()
        answers: list[httpx.Response] = []
        while sum(response.status_code != 202 for response in answers) < 20:
            response = service.post(client, bulk, metadata={"answer": str(len(answers))})
            assert response.status_code in (202, 503, 507), response.text
            answers.append(response)
            assert len(answers) < 2000, "the disk does not fill"
        assert 507 in {response.status_code for response in answers}
        assert client.get("/healthz").is_success
        disk.empty()
        await_condition(lambda: service.post(client, prompts(1)).status_code == 202, "room")
        assert (worker.poll(), courier.poll()) == (None, None)
        accepted |= {job_id_of(response): bulk for response in answers if response.status_code == 202}
        for job_id, lines in accepted.items():
            service.await_completion(client, job_id, lines)
        # Of what was refused nothing is seen. A 503 leaves it open: Postgres may have died after the commit.
        visible = [job["metadata"] for job in all_jobs(client)]
        for place, response in enumerate(answers):
            if response.status_code != 503:
                assert ({"answer": str(place)} in visible) == (response.status_code == 202)
        check(service.database_url)
