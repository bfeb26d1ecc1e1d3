"""One worker that serves two models in turn: jobs of both end, and each answer is that of its model alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine import Engine, EngineConfig, SamplingParams
from tests.parity.tiny_models import NATIVE
from tests.support.fake_worker import MODEL, OTHER_MODEL, Runner, engine_of, load
from tests.support.oracle import check
from tests.support.pipeline import Pipeline
from tests.support.processes import await_condition
from tests.support.service import MAX_TOKENS, Service

WORK = [[3 + line % 40, 5, 7, 3 + line % 30] for line in range(24)]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, kind in ((MODEL, "llama"), (OTHER_MODEL, "gpt2")):
        found[name] = tmp_path / name
        next(model for model in NATIVE if model.name == kind).save(found[name])
    return found


@pytest.fixture
def service(database_url: str, redis_url: str, tmp_path: Path, models: dict[str, Path]) -> Iterator[Service]:
    options = [word for path in models.values() for word in ("--model", str(path))]
    environment = {
        "PAGEMILL_DEVICE": "cpu",
        "PAGEMILL_KV_CACHE_BYTES": str(2**22),
        "PAGEMILL_KEPT_MODEL_BYTES": "0",  # each switch unloads one and loads the other
    }
    with contextlib.closing(
        Service(database_url, redis_url, tmp_path, environment, ("cli", "worker", *options))
    ) as service:
        yield service


def test_jobs_of_two_models_complete_on_one_worker_with_each_models_own_answers(
    service: Service, models: dict[str, Path]
) -> None:
    engines = {
        name: Engine.from_pretrained(path, EngineConfig(device="cpu", cpu_kv_cache_bytes=2**22))
        for name, path in models.items()
    }
    with service.api() as client, service.worker() as worker:
        known = {model["id"]: model["live_workers"] for model in client.get("/v1/models").json()["data"]}
        assert known == dict.fromkeys(models, 1)
        jobs = [(model, service.accepted(client, WORK, model=model)) for model in list(models) * 2]
        for model, job_id in jobs:
            service.await_completion(client, job_id, WORK, undisturbed=lambda model=model: engines[model])  # type: ignore[misc]
        # Callers who wait count as demand of a model, too.
        for model in models:
            answered = ask(client, model)
            assert answered == tokens_of(engines[model])
        (row,) = client.get("/v1/workers").json()["data"]
        assert (row["status"], row["models"], row["model"]) == ("live", sorted(models), OTHER_MODEL)
        assert row["completion_tokens"] > 0
        assert worker.poll() is None
    check(service.database_url)


def ask(client: httpx.Client, model: str) -> list[str]:
    answer = client.post(
        "/v1/completions",
        json={"model": model, "prompt": [3, 5, 7], "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 0},
    )
    assert answer.status_code == 200, answer.text
    tokens: list[str] = answer.json()["choices"][0]["logprobs"]["tokens"]
    return tokens


def tokens_of(engine: Engine) -> list[str]:
    (output,) = engine.generate([[3, 5, 7]], SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    return [f"token_id:{token}" for token in output.token_ids]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Its file lets the second fake model load."""
    gate = tmp_path / "gate"
    gate.touch()
    return gate


@pytest.fixture
def pipeline(database_url: str, redis_url: str, tmp_path: Path, gate: Path) -> Iterator[Pipeline]:
    with contextlib.closing(Pipeline(database_url, redis_url, tmp_path, {"FAKE_LOAD_GATE": str(gate)})) as pipeline:
        yield pipeline


def await_turn_of_the_other(pipeline: Pipeline) -> None:
    statement = "SELECT 1 FROM workers WHERE ended_at IS NULL AND model = :model"
    await_condition(lambda: bool(pipeline.query(statement, model=OTHER_MODEL)), "the other model's turn")


@pytest.mark.slow
@pytest.mark.faults
def test_long_switch_is_no_hang_and_keeps_the_lease(pipeline: Pipeline, gate: Path) -> None:
    with pipeline.worker(PAGEMILL_WATCHDOG="4") as process:
        (worker_id,) = pipeline.live_workers()
        gate.unlink()
        job_id = pipeline.submit(WORK, model=OTHER_MODEL)
        await_turn_of_the_other(pipeline)
        (began,) = pipeline.query("SELECT clock_timestamp() AS now")
        # Longer than the watchdog lets any step take, and than a lease.
        statement = "SELECT 1 FROM workers WHERE heartbeat_at > CAST(:began AS timestamptz) + interval '5 seconds'"
        await_condition(lambda: bool(pipeline.query(statement, began=began.now)), "heartbeats in the middle of a load")
        assert pipeline.states(job_id) == {"pending": len(WORK)}
        gate.touch()
        assert pipeline.wait_for_end(job_id).completed == len(WORK)
        assert pipeline.live_workers() == {worker_id}
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.faults
def test_worker_killed_in_the_middle_of_a_switch_loses_nothing(pipeline: Pipeline, gate: Path) -> None:
    with pipeline.worker() as process:
        first = pipeline.submit(WORK, logprobs=0)
        assert pipeline.wait_for_end(first).completed == len(WORK)
        gate.unlink()
        other = pipeline.submit(WORK, model=OTHER_MODEL, logprobs=0)
        await_turn_of_the_other(pipeline)
        last = pipeline.submit(WORK, logprobs=0)  # for the model that was just left
        process.send_signal(signal.SIGKILL)
        process.wait()
    await_condition(lambda: pipeline.reap() is not None, "the end of the lease")
    check(pipeline.database_url)
    assert {row.deaths for row in pipeline.query("SELECT deaths FROM requests")} == {0}
    gate.touch()
    with pipeline.worker():
        for job_id, engine in ((other, engine_of(Runner(0, is_other=True))), (last, load())):
            assert pipeline.wait_for_end(job_id).completed == len(WORK)
            outputs = engine.generate(WORK, SamplingParams(temperature=0, max_tokens=20))
            for line, output in enumerate(outputs, 1):
                tokens = pipeline.results(job_id)[line]["response"]["body"]["choices"][0]["logprobs"]["tokens"]
                assert tokens == [f"token_id:{token}" for token in output.token_ids]
    check(pipeline.database_url)
