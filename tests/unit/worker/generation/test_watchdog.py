"""The watchdog over a worker's own threads: one that stands still ends the process, and no request is charged."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock
from uuid import UUID

import pytest

from jobs.queries.settling import ClaimToken, Outcome
from jobs.requests import ModelLimits
from jobs.settings import Settings
from jobs.states import RequestState
from tests.support.processes import PATIENCE
from worker.generation import heartbeat as heartbeat_module
from worker.generation import service as service_module
from worker.generation import writer as writer_module
from worker.generation.engine_roster import ServedModel
from worker.generation.service import EXIT_BROKEN, GenerationService

WORKER = UUID(int=1)
ANSWER = Outcome(
    ClaimToken(UUID(int=2), 1, 1, WORKER),
    RequestState.COMPLETED,
    b"{}",
    prompt_tokens=1,
    cached_tokens=0,
    completion_tokens=1,
)


def let_writer_hang(service: GenerationService, monkeypatch: pytest.MonkeyPatch, hang: Callable[..., object]) -> None:
    monkeypatch.setattr(writer_module, "settle", hang)
    service._writer.put(ANSWER)
    service._writer.flush_soon()


def let_heartbeat_hang(
    service: GenerationService, monkeypatch: pytest.MonkeyPatch, hang: Callable[..., object]
) -> None:
    monkeypatch.setattr(heartbeat_module.workers, "heartbeat", hang)
    service._heartbeat.start([ModelLimits("fake", max_model_len=8, vocab_size=8)])


@pytest.mark.parametrize(("name", "let_it_hang"), [("writer", let_writer_hang), ("heartbeat", let_heartbeat_hang)])
def test_hanging_thread_ends_the_process_and_charges_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, let_it_hang: Callable[..., None]
) -> None:
    monkeypatch.setattr(service_module, "WATCH_INTERVAL", 0.01)
    freed: list[object] = []
    monkeypatch.setattr(service_module, "release_dead_worker", lambda *_, suspects, **__: freed.append(list(suspects)))
    with service_without_a_database(monkeypatch) as service, released_at_the_end() as hang:
        let_it_hang(service, monkeypatch, hang)
        exit_codes: list[int] = []

        def exit_now(code: int) -> None:
            exit_codes.append(code)
            service._stopped.set()

        monkeypatch.setattr(service_module.os, "_exit", exit_now)
        with caplog.at_level(logging.CRITICAL):
            service._watchdog.start()
            service._watchdog.join(PATIENCE)
        assert exit_codes == [EXIT_BROKEN]
        assert f"the {name} thread made no progress" in caplog.text
        assert freed == [[]]
        assert service._lease.worker_id is None


@contextmanager
def service_without_a_database(monkeypatch: pytest.MonkeyPatch) -> Iterator[GenerationService]:
    """A worker's threads, of which only the writer runs, with a lease and a database that answers to everything."""
    monkeypatch.setattr(service_module, "connect", lambda *_: MagicMock())
    settings = Settings(watchdog=0.3, heartbeat_interval=0.01)
    service = GenerationService(settings, [ServedModel("fake", lambda: pytest.fail("loads"))], device="cpu")
    service._lease.take(WORKER, time.monotonic())
    service._writer.start()
    yield service
    service._heartbeat.close()
    service._writer.close(PATIENCE)


@contextmanager
def released_at_the_end() -> Iterator[Callable[..., object]]:
    """A function that returns only when the block has ended."""
    ended = threading.Event()

    def hang(*_: object, **__: object) -> object:
        ended.wait(PATIENCE)
        return MagicMock(written=1)

    yield hang
    ended.set()
