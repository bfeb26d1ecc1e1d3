"""`pagemill worker --gpus` as real processes, on a machine whose GPUs are pretended: the workers compute on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.pipeline import QUICK, Pipeline
from tests.support.processes import PATIENCE, await_condition, await_gone, family


@pytest.fixture
def pipeline(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Pipeline]:
    with contextlib.closing(Pipeline(database_url, redis_url, tmp_path)) as pipeline:
        yield pipeline


@contextlib.contextmanager
def supervised(pipeline: Pipeline, gpus: str) -> Iterator[subprocess.Popen[bytes]]:
    with (pipeline.directory / "workers.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "worker", "--model", "demo", "--gpus", gpus],
            env={
                **os.environ,
                **QUICK,
                "CUDA_VISIBLE_DEVICES": "3,5,6",
                "PAGEMILL_DEVICE": "cpu",
                "PAGEMILL_KV_CACHE_BYTES": str(2**22),
                "PAGEMILL_DATABASE_URL": pipeline.database_url,
                "PAGEMILL_REDIS_URL": pipeline.redis_url,
            },
            stdout=log,
            stderr=log,
        )
    started = []
    try:
        yield process
        started = family([process.pid]) if process.poll() is None else []
    finally:
        process.kill()
        process.wait()
    await_gone(started)


def pids(pipeline: Pipeline) -> set[int]:
    return {row.pid for row in pipeline.query("SELECT pid FROM workers WHERE ended_at IS NULL")}


def gpu_of(pid: int) -> str:
    return psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"]


def await_start(pipeline: Pipeline) -> None:
    """Wait until the supervisor has seen each worker ready: one that ends before that is a failed start."""
    log = pipeline.directory / "workers.log"
    await_condition(lambda: "every worker serves" in log.read_text(), "the start of all workers")


@pytest.mark.slow
@pytest.mark.faults
def test_each_gpu_has_a_worker_and_one_that_dies_is_started_again_alone(pipeline: Pipeline) -> None:
    with supervised(pipeline, "0,2") as supervisor:
        await_start(pipeline)
        by_gpu = {gpu_of(pid): pid for pid in pids(pipeline)}
        assert set(by_gpu) == {"3", "6"}
        assert {psutil.Process(pid).ppid() for pid in by_gpu.values()} == {supervisor.pid}
        os.kill(by_gpu["3"], signal.SIGKILL)
        await_condition(lambda: bool(pids(pipeline) - set(by_gpu.values())), "another life of the first")
        (again,) = pids(pipeline) - set(by_gpu.values())
        assert gpu_of(again) == "3"
        assert psutil.pid_exists(by_gpu["6"])
        await_condition(lambda: pipeline.reap() is not None, "the end of the lease")
        assert pids(pipeline) == {again, by_gpu["6"]}
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=PATIENCE) == 0
        assert pids(pipeline) == set()


@pytest.mark.slow
def test_supervisor_ends_when_each_worker_ended_as_it_was_asked(pipeline: Pipeline) -> None:
    with supervised(pipeline, "all") as supervisor:
        await_start(pipeline)
        assert len(pids(pipeline)) == 3
        pipeline.query("UPDATE workers SET wanted = 'drain' RETURNING id")
        assert supervisor.wait(timeout=PATIENCE) == 0
        assert pids(pipeline) == set()
