"""The cautious copy of a worker's lease, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from uuid import UUID

import pytest

from worker.generation import lease as lease_module
from worker.generation.lease import Lease

WORKER = UUID(int=1)
MoveTo = Callable[[float], None]


@pytest.fixture
def move_to(monkeypatch: pytest.MonkeyPatch) -> MoveTo:
    """Sets the monotonic clock, which begins at 100 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return lambda now: setattr(clock, "now", now)


def test_lease_is_good_until_the_fence(move_to: MoveTo) -> None:
    lease = Lease(fence_after=20)
    lease.take(WORKER, 99.0)
    assert lease.is_good
    move_to(118.9)
    assert lease.is_good
    move_to(119.0)
    assert not lease.is_good
    assert lease.worker_id == WORKER  # the next heartbeat may still find it alive
    lease.take(WORKER, 119.0)
    assert lease.is_good


def test_lease_is_not_good_without_a_worker(move_to: MoveTo) -> None:
    lease = Lease(fence_after=1000)
    assert not lease.is_good
    lease.take(WORKER, 100.0)
    lease.lose()
    assert not lease.is_good
    assert lease.worker_id is None
