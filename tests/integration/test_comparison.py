"""The harness on a tiny model: our engine beside a rival, and one that is not installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bench import comparison as comparing
from bench.comparison import Comparison, Entry, Turn
from bench.contender import contenders
from bench.summary import ratios, record, rows
from bench.workload import workloads

NO_CEILINGS = {"precisions": {}}


def children() -> set[int]:
    """Processes that this one started itself: those that a server starts come and go."""
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.timeout(900)  # it starts three processes that load torch
def test_contenders_take_turns_and_make_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine any contender may be slow, and little memory free.
    monkeypatch.setattr(comparing, "HOPELESS", float("inf"))
    monkeypatch.setattr(comparing, "ENOUGH_MEMORY", 0.0)
    # In this environment instead of their own.
    names = ("engine", "transformers-padded", "vllm")
    entries = [Entry(replace(contenders()[name], environment=None), "float32") for name in names]
    ours, rival, absent = entries
    workload = workloads()["tiny"]
    before = children()  # other tests of this process may have left servers running
    with Comparison(workload, entries, tmp_path, threads=1, limit=600) as comparison:
        comparison.prepare()
        for number in range(2):
            comparison.round(number)
        found = record(comparison, NO_CEILINGS, "pytest", threads=1)
        assert len(children() - before) == 2  # halted, but here
    assert children() <= before

    assert absent.failure == "ModuleNotFoundError: No module named 'vllm'"
    assert not absent.turns
    tokens = sum(request.max_tokens for request in workload.requests(0))
    for entry in (ours, rival):
        assert entry.failure is None
        assert [turn.round for turn in entry.turns] == [0, 1]
        assert all(turn.output_tokens == tokens and turn.measured_requests == 6 for turn in entry.turns)
        assert all(turn.seconds > 0 and turn.peak_memory > 2**20 for turn in entry.turns)
    # Other prompts each round, and the same for both.
    assert ours.outputs[0] != ours.outputs[1]
    assert ours.outputs == rival.outputs
    assert [entry["same_tokens"] for entry in found["entries"]] == [None, 1.0, None]
    assert {row.name for row in rows(found)} == set(names)
    assert ratios(found, found["entries"][0], found["entries"][1]) is not None


def test_contender_that_is_several_times_as_slow_takes_one_turn(tmp_path: Path) -> None:
    entries = [Entry(contenders()[name], "float32") for name in ("engine", "vllm")]
    entries += [Entry(contenders()["openvino"], "int8")]
    for entry, seconds in zip(entries, (1.0, 3.5, 9.0), strict=True):
        entry.turns.append(Turn(0, seconds, 6, 24, 0.0, 0, 0.0))
    with Comparison(workloads()["tiny"], entries, tmp_path, threads=1, limit=1) as comparison:
        taken: list[str] = []
        comparison._turn = lambda entry, number: taken.append(entry.name)  # type: ignore[method-assign]
        comparison.round(1)
    # Others in another precision do not count.
    assert taken == ["engine float32", "openvino int8"]
