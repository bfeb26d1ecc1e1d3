"""The token budget after steps that did not fit into memory."""

from __future__ import annotations

from engine.scheduling.memory_backoff import MemoryBackoff


def test_memory_backoff_recovers() -> None:
    pressure = MemoryBackoff(32)
    pressure.shrink(32)
    assert pressure.tokens == 16
    for _ in range(128):
        pressure.record_success()
    assert pressure.tokens == 32
    pressure.shrink(20)
    for _ in range(128):
        pressure.record_success()
    assert pressure.tokens == 10  # it was wrong before, and waits longer
    for _ in range(5):
        pressure.shrink(1)
    assert pressure.tokens == 1
