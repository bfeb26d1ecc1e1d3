"""Workers that die, freeze, hang and break, in the middle of a job: nothing is lost, nothing runs twice to a result."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import SamplingParams
from tests.support.fake_worker import BREAK, HANG, POISON, load
from tests.support.oracle import check
from tests.support.pipeline import Pipeline
from tests.support.processes import PATIENCE, await_condition

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def pipeline(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Pipeline]:
    with contextlib.closing(Pipeline(database_url, redis_url, tmp_path)) as pipeline:
        yield pipeline


def prompts(count: int) -> list[list[int]]:
    return [[1 + line % 40, 5, 7, line % 30] for line in range(count)]


def test_job_loses_and_repeats_nothing_when_workers_are_killed(pipeline: Pipeline) -> None:
    job_id = pipeline.submit(prompts(600), logprobs=0)
    rng = random.Random(1)
    for kill_after in sorted(rng.sample(range(50, 400), 2)):
        with pipeline.worker(FAKE_STEP_SECONDS="0.01") as process:
            pipeline.wait_for_results(job_id, kill_after)
            process.kill()
            process.wait()
        written = pipeline.results(job_id)
        await_condition(lambda: pipeline.reap() is not None, "the end of the lease")
        check(pipeline.database_url)
        assert pipeline.states(job_id).get("running", 0) == 0
        # What was written stays as it was written.
        assert {line: pipeline.results(job_id)[line] for line in written} == written
    with pipeline.worker():
        job = pipeline.wait_for_end(job_id)
    assert (job.completed, job.failed, job.last_seq) == (600, 0, 600)
    results = pipeline.results(job_id)
    assert sorted(results) == list(range(1, 601))
    # Greedy, so each answer is that of an undisturbed engine.
    undisturbed = load().generate(prompts(600), SamplingParams(temperature=0, max_tokens=20))
    for line, output in enumerate(undisturbed, 1):
        tokens = results[line]["response"]["body"]["choices"][0]["logprobs"]["tokens"]
        assert tokens == [f"token_id:{token}" for token in output.token_ids]
    check(pipeline.database_url)


def test_worker_writes_nothing_after_its_claims_were_freed(pipeline: Pipeline) -> None:
    job_id = pipeline.submit(prompts(300))
    with pipeline.worker(FAKE_STEP_SECONDS="0.1") as zombie:
        pipeline.wait_for_results(job_id, 1)
        zombie.send_signal(signal.SIGSTOP)
        await_condition(lambda: pipeline.reap() is not None, "the end of the zombie's lease")
        with pipeline.worker():
            pipeline.wait_for_end(job_id)
            before = pipeline.results(job_id)
            zombie.send_signal(signal.SIGCONT)
            # It finds out, and serves again under another id.
            await_condition(lambda: len(pipeline.live_workers()) == 2, "the zombie's new life")
            assert pipeline.results(job_id) == before
            assert pipeline.job(job_id).completed == 300
            assert pipeline.wait_for_end(pipeline.submit(prompts(40))).completed == 40
        check(pipeline.database_url)


def test_request_that_kills_its_process_is_given_up_alone(pipeline: Pipeline) -> None:
    job_id = pipeline.submit([*prompts(30), [1, POISON, 2], *prompts(30)])
    deaths = 0
    while not pipeline.job(job_id).is_terminal:
        with pipeline.worker() as process:
            while process.poll() is None and not pipeline.job(job_id).is_terminal:
                time.sleep(0.05)
            if process.poll() is not None:
                deaths += 1
                assert process.returncode == -signal.SIGSEGV
                await_condition(lambda: pipeline.reap() is not None, "the end of the lease")
    job = pipeline.job(job_id)
    assert deaths == pipeline.settings.max_deaths
    assert (job.completed, job.failed) == (60, 1)
    assert pipeline.results(job_id)[31]["error"]["code"] == "worker_died"
    check(pipeline.database_url)


def test_broken_engine_frees_its_requests_and_ends_its_process(pipeline: Pipeline) -> None:
    job_id = pipeline.submit([*prompts(10), [1, BREAK, 2], *prompts(10)])
    with pipeline.worker() as process:
        assert process.wait(timeout=PATIENCE) == 1
    assert "running" not in pipeline.states(job_id)
    assert pipeline.live_workers() == set()
    check(pipeline.database_url)


def test_hanging_engine_ends_its_process(pipeline: Pipeline) -> None:
    job_id = pipeline.submit([[1, HANG, 2]])
    with pipeline.worker(PAGEMILL_WATCHDOG="1.5") as process:
        assert process.wait(timeout=PATIENCE) == 1
    assert pipeline.states(job_id) == {"pending": 1}
    assert pipeline.query("SELECT deaths FROM requests")[0].deaths == 1
    check(pipeline.database_url)


def test_crashing_thread_ends_its_process(pipeline: Pipeline) -> None:
    with pipeline.worker(FAKE_BROKEN_SUBMIT="secret") as process:
        job_id = pipeline.submit(prompts(3))  # now, or it may be gone before the test has seen that it came
        assert process.wait(timeout=PATIENCE) == 1
    assert pipeline.states(job_id) == {"pending": 3}
    assert {row.deaths for row in pipeline.query("SELECT deaths FROM requests")} == {1}
    assert pipeline.live_workers() == set()
    log = (pipeline.directory / "worker.log").read_text()
    assert "the claims thread crashed" in log
    assert "secret" not in log
    check(pipeline.database_url)


def test_hanging_tokenizer_ends_its_process_and_charges_its_line_alone(pipeline: Pipeline) -> None:
    job_id = pipeline.submit(prompts(3))
    # The only text beside token ids, and so the only one in work.
    hanging = b'{"prompt": "hang", "max_tokens": 4}'
    pipeline.query("UPDATE bodies SET body = :body WHERE line = 2 RETURNING 1", body=hanging)
    with pipeline.worker(PAGEMILL_WATCHDOG="1.5", FAKE_HANGING_TOKENIZER="1") as process:
        assert process.wait(timeout=PATIENCE) == 1
    assert pipeline.states(job_id) == {"pending": 3}
    rows = pipeline.query("SELECT line, deaths FROM requests ORDER BY line")
    assert [tuple(row) for row in rows] == [(1, 0), (2, 1), (3, 0)]
    assert "the claims thread made no progress" in (pipeline.directory / "worker.log").read_text()
    check(pipeline.database_url)
