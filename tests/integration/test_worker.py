"""A worker process beside a real Postgres and a real Redis, when nothing goes wrong."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs.line_timing import StoredTiming
from jobs.queries import fleet
from jobs.queries.fleet import FleetWorker
from jobs.queries.settling import cancel_job, settle_open
from jobs.queues import DRAIN_TASK, model_queue
from jobs.states import Wanted
from tests.support.fake_worker import MODEL
from tests.support.oracle import check
from tests.support.pipeline import Pipeline
from tests.support.processes import PATIENCE, await_condition
from tests.support.services import Services
from worker.app import make_app

GATE = "gate"


@pytest.fixture
def pipeline(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Pipeline]:
    with contextlib.closing(Pipeline(database_url, redis_url, tmp_path)) as pipeline:
        yield pipeline


@contextlib.contextmanager
def serving(services: Services, directory: Path, **environment: str) -> Iterator[Pipeline]:
    """A pipeline with a worker that lives through the whole block."""
    with (
        services.database() as url,
        contextlib.closing(Pipeline(url, services.redis_database(), directory)) as pipeline,
        pipeline.worker(**environment) as process,
    ):
        yield pipeline
        assert process.poll() is None


@pytest.fixture(scope="module")
def served(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with serving(services, tmp_path_factory.mktemp("served")) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def slowly_served(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """By a worker whose steps leave time to interfere, and are taken only while its gate is there."""
    directory = tmp_path_factory.mktemp("slowly")
    gate = directory / GATE
    gate.touch()
    clocks = {"FAKE_STEP_SECONDS": "0.1", "PAGEMILL_HEARTBEAT_INTERVAL": "0.1"}
    with serving(services, directory, FAKE_STEP_GATE=str(gate), **clocks) as pipeline:
        yield pipeline


def prompts(count: int) -> list[list[int]]:
    return [[1 + line % 40, 5, 7, line % 30] for line in range(count)]


def test_worker_runs_a_whole_job(served: Pipeline) -> None:
    job = served.wait_for_end(served.submit(prompts(300)))
    assert (job.state, job.completed, job.last_seq) == ("completed", 300, 300)
    results = served.results(job.id)
    assert sorted(results) == list(range(1, 301))
    response = results[1]["response"]
    assert response["status_code"] == 200
    assert response["body"]["object"] == "text_completion"
    assert response["body"]["choices"][0]["finish_reason"] in ("stop", "length")
    usage = response["body"]["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert job.prompt_tokens == 300 * 4
    assert job.completion_tokens == sum(
        result["response"]["body"]["usage"]["completion_tokens"] for result in results.values()
    )
    with served.database.connect() as connection:
        rows = connection.execute(
            text("""
                SELECT s.timing, 1000 * EXTRACT(epoch FROM s.settled_at - r.claimed_at) AS ran
                FROM results s JOIN requests r USING (job_id, line) WHERE s.job_id = :id
            """),
            {"id": job.id},
        ).all()
    for row in rows:
        timing = StoredTiming.read(row.timing)
        assert timing is not None
        phases = (timing.engine, timing.grammar, timing.prefill, timing.decode, timing.preempted, timing.write)
        assert sum(phases) <= float(row.ran) + len(phases)  # each is rounded
    check(served.database_url)


def test_cached_tokens_are_counted_by_line_and_job(served: Pipeline) -> None:
    prompt = [3] * 50
    first = served.wait_for_end(served.submit([prompt]))
    again = served.wait_for_end(served.submit([prompt, [*prompt, 4]]))
    assert first.cached_tokens == 0
    found = [
        result["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for result in served.results(again.id).values()
    ]
    # Whole blocks only.
    assert all(0 < cached < len(prompt) for cached in found)
    assert again.cached_tokens == sum(found)
    check(served.database_url)


def test_worker_claims_on_notification_long_before_its_poll(pipeline: Pipeline) -> None:
    poll_interval, sooner = 600.0, 60.0
    with pipeline.worker(PAGEMILL_POLL_INTERVAL=str(poll_interval)):
        # The first poll after registering is over once the worker waits for a notification.
        first = pipeline.submit(prompts(1))
        app = make_app(pipeline.settings, "test")
        app.send_task(DRAIN_TASK, args=[str(first)], queue=model_queue(MODEL))
        pipeline.wait_for_end(first, timeout=sooner)
        second = pipeline.submit(prompts(1))
        app.send_task(DRAIN_TASK, args=[str(second)], queue=model_queue(MODEL))
        pipeline.wait_for_end(second, timeout=sooner)


def test_worker_finds_work_by_its_poll_without_redis(pipeline: Pipeline) -> None:
    with pipeline.worker(PAGEMILL_REDIS_URL="redis://127.0.0.1:1/0") as process:
        job = pipeline.wait_for_end(pipeline.submit(prompts(20)))
        assert job.completed == 20
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0
    check(pipeline.database_url)


def test_line_refused_by_the_worker_fails_alone(served: Pipeline) -> None:
    fits, text_for_a_model_without_tokenizer = [1, 2, 3], "a text"
    bodies = {
        2: b'{"prompt": "%s", "max_tokens": 4}' % text_for_a_model_without_tokenizer.encode(),
        3: b'{"prompt": [%s], "max_tokens": 4}' % b",".join([b"1"] * 127),
    }
    job_id = served.submit([fits, fits, fits], bodies=bodies)
    job = served.wait_for_end(job_id)
    assert (job.state, job.completed, job.failed) == ("completed", 1, 2)
    results = served.results(job_id)
    assert results[2]["response"]["status_code"] == 400
    assert "tokenizer" in results[2]["response"]["body"]["error"]["message"]
    assert results[3]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert all(result["error"] is None for result in results.values())
    check(served.database_url)


def test_lines_that_the_worker_cannot_parse_fail_alone(served: Pipeline) -> None:
    # As a newer API might store them, or no API at all.
    bodies = {2: b'{"prompt": [1], "novel": "secret"}', 3: b'"secret', 4: b'["secret"]', 5: b"{}"}
    job_id = served.submit(prompts(5), bodies=bodies)
    job = served.wait_for_end(job_id)
    assert (job.state, job.completed, job.failed) == ("completed", 1, 4)
    assert {row.deaths for row in served.query("SELECT deaths FROM requests")} == {0}
    statuses = {line: result["response"]["status_code"] for line, result in served.results(job_id).items()}
    assert statuses == {1: 200, 2: 500, 3: 400, 4: 400, 5: 400}
    assert "secret" not in (served.directory / "worker.log").read_text()
    check(served.database_url)


def test_sigterm_releases_requests_that_do_not_finish_in_time(pipeline: Pipeline) -> None:
    with pipeline.worker(FAKE_STEP_SECONDS="0.2") as process:
        job_id = pipeline.submit(prompts(200))
        await_condition(lambda: "running" in pipeline.states(job_id), "a claim")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 0
    states = pipeline.states(job_id)
    assert "running" not in states
    assert states["pending"] > 0
    assert pipeline.query("SELECT max(deaths) AS deaths FROM requests")[0].deaths == 0
    assert pipeline.live_workers() == set()
    check(pipeline.database_url)
    with pipeline.worker():
        assert pipeline.wait_for_end(job_id).completed == 200
    check(pipeline.database_url)


def want(pipeline: Pipeline, wanted: Wanted | None) -> None:
    with pipeline.database.begin() as connection:
        [worker] = [worker for worker in fleet.list_workers(connection) if worker.is_live]
        assert fleet.set_wanted(connection, worker.id, wanted)


def ended_worker(pipeline: Pipeline) -> FleetWorker:
    with pipeline.database.begin() as connection:
        [worker] = fleet.list_workers(connection)
    return worker


def await_wish(pipeline: Pipeline, wish: str) -> None:
    """Wait for the heartbeat that brings what is wanted."""
    log = pipeline.directory / "worker.log"
    await_condition(lambda: f"wants of this worker: {wish}" in log.read_text(), "the heartbeat that brings it")


def test_drained_worker_claims_nothing_more_writes_what_it_holds_and_ends(pipeline: Pipeline, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with pipeline.worker(FAKE_STEP_GATE=str(gate), PAGEMILL_HEARTBEAT_INTERVAL="0.2") as process:
        job_id = pipeline.submit(prompts(1000))
        await_condition(lambda: "running" in pipeline.states(job_id), "a claim")
        want(pipeline, Wanted.DRAIN)
        await_wish(pipeline, "drain")
        gate.touch()
        assert process.wait(timeout=PATIENCE) == 0
    states = pipeline.states(job_id)
    assert set(states) == {"completed", "pending"}
    # Nothing that it had claimed was given back.
    assert pipeline.query("SELECT count(*) AS lines FROM requests WHERE epoch > 0")[0].lines == states["completed"]
    assert (ended_worker(pipeline).end_reason, ended_worker(pipeline).freed) == ("stopped", 0)
    check(pipeline.database_url)


def test_undrained_worker_claims_again(slowly_served: Pipeline) -> None:
    gate = slowly_served.directory / GATE
    gate.unlink()
    try:
        job_id = slowly_served.submit(prompts(1000), max_tokens=2)
        await_condition(lambda: "running" in slowly_served.states(job_id), "a claim")
        want(slowly_served, Wanted.DRAIN)
        await_wish(slowly_served, "drain")
        assert "pending" in slowly_served.states(job_id)
        want(slowly_served, None)
        await_wish(slowly_served, "to go on")
    finally:
        gate.touch()
    assert slowly_served.wait_for_end(job_id).completed == 1000


def test_stopped_worker_gives_its_lines_back_at_once(pipeline: Pipeline) -> None:
    with pipeline.worker(FAKE_STEP_SECONDS="0.5", PAGEMILL_HEARTBEAT_INTERVAL="0.2") as process:
        job_id = pipeline.submit(prompts(200))
        await_condition(lambda: "running" in pipeline.states(job_id), "a claim")
        want(pipeline, Wanted.STOP)
        assert process.wait(timeout=PATIENCE) == 0
    assert "running" not in pipeline.states(job_id)
    assert pipeline.query("SELECT max(deaths) AS deaths FROM requests")[0].deaths == 0
    assert ended_worker(pipeline).freed > 0
    check(pipeline.database_url)


@pytest.mark.slow
@pytest.mark.faults
def test_slow_end_of_a_worker_is_not_taken_for_a_hang(pipeline: Pipeline) -> None:
    """Its last step takes long, and then Postgres does."""
    with pipeline.worker(FAKE_STEP_SECONDS="8", PAGEMILL_DRAIN_DEADLINE="0") as process:
        job_id = pipeline.submit(prompts(1), max_tokens=1)
        await_condition(lambda: "running" in pipeline.states(job_id), "a claim")
        with pipeline.database.begin() as connection:
            connection.execute(text("SELECT FROM jobs WHERE id = :id FOR UPDATE"), {"id": job_id})
            process.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=14)
        assert process.wait(timeout=PATIENCE) == 0
    assert pipeline.states(job_id) == {"completed": 1}
    assert pipeline.live_workers() == set()
    check(pipeline.database_url)


def test_cancelled_job_leaves_the_engine(slowly_served: Pipeline) -> None:
    cancelled = slowly_served.submit(prompts(500))
    slowly_served.wait_for_results(cancelled, 1)
    with slowly_served.database.begin() as connection:
        assert cancel_job(connection, slowly_served.tenant.id, cancelled) == "cancelling"
    while not slowly_served.job(cancelled).is_terminal:
        with slowly_served.database.begin() as connection:
            settle_open(connection, cancelled, limit=100)
    job = slowly_served.job(cancelled)
    assert job.state == "cancelled"
    assert job.completed + job.cancelled == 500
    assert job.cancelled > 0
    # The engine is free again for what comes next.
    assert slowly_served.wait_for_end(slowly_served.submit(prompts(5))).completed == 5
    check(slowly_served.database_url)


def test_hundred_equal_messages_are_one_execution(served: Pipeline) -> None:
    job_id = served.submit(prompts(50))
    app = make_app(served.settings, "test")
    for _ in range(100):
        app.send_task(DRAIN_TASK, args=[str(job_id)], queue=model_queue(MODEL))
    assert served.wait_for_end(job_id).completed == 50
    assert {row.epoch for row in served.query("SELECT epoch FROM requests WHERE job_id = :id", id=job_id)} == {1}
    check(served.database_url)
