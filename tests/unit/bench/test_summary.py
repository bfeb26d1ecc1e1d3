"""Figures from turns, and the document that they are written into."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import publish
from bench.publish import keep, table
from bench.summary import ratios, rows
from bench.workload import workloads


def _turn(number: int, seconds: float, others: float = 0.0) -> dict[str, Any]:
    return {
        "round": number,
        "seconds": seconds,
        "measured_requests": 50,
        "output_tokens": 1000,
        "load_seconds": 1.5,
        "peak_memory": 2_000_000_000,
        "others_cpu_seconds": others,
    }


def _entry(contender: str, precision: str, *turns: dict[str, Any], failure: str | None = None) -> dict[str, Any]:
    return {
        "contender": contender,
        "title": contender.title(),
        "precision": precision,
        "versions": {contender: "1.2.3"},
        "failure": failure,
        "turns": list(turns),
        "same_tokens": None,
    }


RECORD: dict[str, Any] = {
    "workload": "W1",
    "title": "gpt2-large",
    "command": "python -m bench --workload W1",
    "requests": 50,
    "threads": 2,
    "measured": {"at": "2026-01-01T00:00:00Z", "commit": "abc", "cpu": "a CPU", "cores": 2, "memory_gib": 24.0},
    "ceilings": {"flops": 1, "precisions": {"float32": {"least_seconds": 1.0, "compute": 100.0, "memory": 20.0}}},
    "entries": [
        # The machine was twice as slow in the second round, for both.
        _entry("engine", "float32", _turn(0, 2.0), _turn(1, 4.0), _turn(2, 2.0)),
        _entry("openvino", "float32", _turn(0, 3.0), _turn(1, 6.0), failure="it took longer than 600 s"),
        _entry("ctranslate2", "float32", _turn(0, 1.0, others=0.4)),
        _entry("vllm", "float32", failure="RuntimeError: this CPU\nlacks something"),
    ],
}


def test_ratios_pair_turns_of_the_same_round() -> None:
    ours, openvino, *_ = RECORD["entries"]
    spread = ratios(RECORD, ours, openvino)
    assert spread is not None
    assert (spread.median, spread.least, spread.most) == (1.5, 1.5, 1.5)
    assert ratios(RECORD, ours, RECORD["entries"][3]) is None


def test_rows_are_sorted_by_speed_with_failures_last() -> None:
    found = rows(RECORD)
    assert [row.name for row in found] == ["ctranslate2", "engine", "openvino", "vllm"]
    engine = found[1]
    assert engine.tokens_per_second is not None
    assert (engine.tokens_per_second.least, engine.tokens_per_second.most) == (250.0, 500.0)
    assert engine.requests_per_second == 25.0
    assert engine.of_ceiling == 0.5
    assert found[0].noise == 0.2


def test_rival_that_took_no_turn_is_named_with_its_reason() -> None:
    assert "**Vllm, float32** took no turn: RuntimeError: this CPU lacks something" in table(RECORD)
    assert "| Openvino | float32 | 250 (167 … 333) |" in table(RECORD)


def test_publishing_replaces_what_is_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "DOCUMENT", tmp_path / "benchmarks.md")
    (tmp_path / "benchmarks.md").write_text("before\n<!-- bench W1 -->\nold\n<!-- end W1 -->\nafter\n")
    keep(RECORD)
    once = (tmp_path / "benchmarks.md").read_text()
    keep(RECORD)
    assert (tmp_path / "benchmarks.md").read_text() == once
    assert once.startswith("before\n<!-- bench W1 -->\n### W1")
    assert once.endswith("<!-- end W1 -->\nafter\n")
    assert "old" not in once
    assert "Others took CPU during turns of: Ctranslate2 float32 (20%)" in once
    assert json.loads((tmp_path / "results" / "W1.json").read_text()) == RECORD
    assert (tmp_path / "results" / "W1.svg").read_text().count("<rect") == 1 + 3

    elsewhere = copy.deepcopy(RECORD) | {"workload": "W2"}
    with pytest.raises(LookupError, match="no place for W2"):
        keep(elsewhere)


def test_benchmarks_page_has_a_place_for_every_workload() -> None:
    text = publish.DOCUMENT.read_text()
    for name in workloads().keys() - {"tiny"}:
        assert f"<!-- bench {name} -->" in text
        assert f"<!-- end {name} -->" in text
