"""What `python -m bench live` makes of its turns."""

from __future__ import annotations

import pytest

from bench.live import Pair, _difference, _in_turns, table


def test_difference_is_that_of_one_round() -> None:
    found = _difference([Pair(0.010, 0.030), Pair(0.100, 0.150)])
    assert found["added"] == pytest.approx({"median": 35.0, "min": 20.0, "max": 50.0})


def test_turns_alternate_and_the_first_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    order = []
    pairs = _in_turns("nothing", lambda: order.append("engine"), lambda: order.append("service"), 3, warm_up=1)
    assert order == ["engine", "service"] * 4
    assert len(pairs) == 3
    assert "nothing" in capsys.readouterr().err


def test_table_says_what_was_found_beside_the_aims() -> None:
    spread = {"median": 1000.0, "min": 900.0, "max": 1100.0}
    difference = {"engine": spread, "service": spread, "added": {"median": 12.4, "min": 9.0, "max": 20.0}}
    found = {
        "first_token_ms": difference,
        "one_line_job_ms": difference,
        "threads": {
            "threads": 50,
            "engine_tokens_per_second": spread,
            "service_tokens_per_second": spread,
            "share_of_the_engine": {"median": 0.5, "min": 0.4, "max": 0.6},
        },
        "streams": {"streams": 200, "whole": 199, "open_together": 200},
    }
    first, job, threads, streams = table(found).splitlines()[2:]
    assert first.endswith("| 12 (9 … 20) | ≤ 30 more |")
    assert job.endswith("| 12 (9 … 20) | ≤ 60 more |")
    assert threads.endswith("| 0.50 (0.40 … 0.60) | ≥ 0.95 |")
    assert streams == "| 200 open streams: whole answers |  | 199 | all open together: yes | all |"
