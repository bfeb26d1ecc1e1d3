"""What `python -m bench batch` makes of its looks, and how it tells a whole answer from one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.large_batch import LINE_BYTES, PHASES, PROCESSES, _check, _rates, _write, table


def test_lines_of_the_file_are_distinct_and_of_equal_length(tmp_path: Path) -> None:
    assert _write(tmp_path / "in.jsonl", 12) == 12 * LINE_BYTES
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    assert {len(line) for line in lines} == {LINE_BYTES - 1}
    assert len({json.loads(line)["custom_id"] for line in lines}) == 12


def test_rates_are_those_of_equal_parts_of_the_lines() -> None:
    seen = [(0.0, 0), (1.0, 500), (3.0, 1000)]
    assert _rates(seen, 1000) == [500.0] * 5 + [250.0] * 5


@pytest.mark.parametrize("answered", [[0, 1], [0, 1, 1], [0, 1, 2, 2]])
def test_check_refuses_lines_that_are_missing_or_answered_twice(tmp_path: Path, answered: list[int]) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(_answers(answered))
    with pytest.raises(RuntimeError):
        _check(output, 3)


def test_check_takes_whole_answers_in_any_order(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(_answers([2, 0, 1]))
    _check(output, 3)


def test_table_has_each_phase_by_line_and_process() -> None:
    by_process = dict.fromkeys(PROCESSES, 2.0)
    usage = {"seconds": 4.0, "cpu_seconds": by_process, "peak_bytes": dict.fromkeys(PROCESSES, 5 * 2**20)}
    rows = table({"lines": 1000, "phases": dict.fromkeys(PHASES, usage)}).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in PHASES]
    assert rows[0] == "| upload | 4.0 | 250 | 2,000 | 2,000 | 2,000 | 2,000 | 5 | 5 | 5 | 5 |"


def _answers(numbers: list[int]) -> str:
    return "".join(
        json.dumps({"custom_id": f"line-{number}", "response": {"status_code": 200}}) + "\n" for number in numbers
    )
