"""A step that raises is run again in parts, until the request at fault is found."""

from __future__ import annotations

from engine import SamplingParams
from engine.loop.fault_isolation import run_isolating_faults
from tests.unit.engine.fake_engine import make
from tests.unit.engine.fake_runner import FakeRunner


def test_isolation_postpones_readers_of_unfilled_blocks() -> None:
    engine = make(FakeRunner(num_blocks=20))
    for name in ("one", "two", "three"):
        engine.add(name, [1 if name == "one" else 2] * 6, SamplingParams(max_tokens=3))
    items = engine.scheduler.schedule().scheduled
    lost = items[1].sequence.table.blocks[:1]
    result = run_isolating_faults(items, 4, lambda part: list(part), unfilled=lost)
    assert result.depends_on_failed == [item for item in items if lost[0] in item.sequence.table.blocks]
    assert result.results == [item for item in items if item not in result.depends_on_failed]
    assert len(result.depends_on_failed) == 2
