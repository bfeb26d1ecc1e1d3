"""A worker whose model two processes share, under the whole service: either of them is killed, nothing is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine import Engine, EngineConfig
from tests.parity.tiny_models import NATIVE
from tests.support.fake_worker import MODEL
from tests.support.processes import PATIENCE, await_gone, family
from tests.support.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

WORK = [[3 + line % 40, 5, 7, 3 + line % 30] for line in range(60)]
RANKS = {
    "PAGEMILL_TENSOR_PARALLEL_SIZE": "2",
    "PAGEMILL_DEVICE": "cpu",
    "PAGEMILL_KV_CACHE_BYTES": str(2**24),
    # Few at once, so that there is time to interfere.
    "PAGEMILL_MAX_NUM_SEQS": "4",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    next(model for model in NATIVE if model.name == "llama").save(directory)
    return directory


@pytest.fixture
def service(database_url: str, redis_url: str, tmp_path: Path, model: Path) -> Iterator[Service]:
    worker = ("cli", "worker", "--model", str(model), "--served-name", MODEL)
    with contextlib.closing(Service(database_url, redis_url, tmp_path, RANKS, worker)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.api() as client, service.courier():
        yield client


def ranks_of(pid: int) -> list[psutil.Process]:
    return [process for process in family([pid])[1:] if "engine.parallel.rank" in process.cmdline()]


@pytest.mark.parametrize("victim", ["worker", "rank"])
def test_job_loses_and_repeats_nothing_when_one_of_its_processes_is_killed(
    service: Service, client: httpx.Client, model: Path, victim: str
) -> None:
    with service.worker() as worker:
        [rank] = ranks_of(worker.pid)
        job_id = service.accepted(client, WORK)
        service.wait_for_results(job_id, 8)
        assert service.job(job_id).last_seq < len(WORK)
        if victim == "worker":
            worker.kill()
            worker.wait()
        else:
            rank.kill()
            assert worker.wait(PATIENCE) == 1
        await_gone([rank])
    written = service.results(job_id)
    assert len(written) < len(WORK)
    with service.worker():
        service.await_completion(
            client,
            job_id,
            WORK,
            timeout=300,
            undisturbed=lambda: Engine.from_pretrained(model, EngineConfig(device="cpu", num_kv_blocks=256)),
        )
    assert {line: service.results(job_id)[line] for line in written} == written


def test_idle_worker_ends_when_its_rank_is_killed(service: Service) -> None:
    with service.worker() as worker:
        [rank] = ranks_of(worker.pid)
        rank.kill()
        assert worker.wait(PATIENCE) == 1
    assert service.live_workers() == set()
    assert "rank 1 ended: by signal 9" in (service.directory / "worker.log").read_text()


def test_terminated_worker_ends_its_rank(service: Service) -> None:
    with service.worker() as worker:
        [rank] = ranks_of(worker.pid)
        # As a service manager does: to all processes.
        rank.terminate()
        worker.terminate()
        assert worker.wait(PATIENCE) == 0
        await_gone([rank])
