"""Running sequences give their slots and blocks to waiting ones of higher priority, and go on afterwards."""

from __future__ import annotations

import pytest

from engine import Engine, SamplingParams
from tests.unit.engine.scheduling.test_scheduler import engine

LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def finish(made: Engine) -> list[str]:
    """Step to the end; requests in the order in which they finished."""
    order = []
    while made.has_unfinished:
        order += [output.request_id for output in made.step()]
        made.check()
    return order


@pytest.mark.parametrize(("seqs", "num_blocks"), [(2, 64), (8, 14)], ids=["no-slot", "no-blocks"])
def test_lower_priority_is_preempted_at_once(seqs: int, num_blocks: int) -> None:
    made = engine(seqs=seqs, num_blocks=num_blocks)
    expected = {}
    for request_id in ("a", "b"):
        alone = engine()
        (output,) = alone.generate([[ord(request_id) % 40] * 5], [LONG])
        expected[request_id] = output.token_ids
        made.add(request_id, [ord(request_id) % 40] * 5, LONG)
    for _ in range(5):
        made.step()
    made.add("urgent", [3] * 44, SHORT, priority=1)
    outputs = []
    while len(outputs) < 1:
        outputs += made.step()
        made.check()
    assert outputs[0].request_id == "urgent"
    assert made.stats().preemptions >= 1
    while made.has_unfinished:
        outputs += made.step()
        made.check()
    assert {output.request_id: output.token_ids for output in outputs[1:]} == expected


def test_equal_priority_waits_for_its_turn() -> None:
    made = engine(seqs=1)
    made.add("a", [5], LONG, priority=1)
    made.step()
    made.add("b", [6], SHORT, priority=1)
    assert finish(made) == ["a", "b"]
    assert made.stats().preemptions == 0
