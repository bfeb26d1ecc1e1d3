"""Rates of an engine between two heartbeats."""

from __future__ import annotations

import time
from unittest import mock

import pytest

from worker.generation.rates import Rates


def test_rates_are_changes_over_the_time_between_looks() -> None:
    rates = Rates()
    first = {"busy_seconds": 1.0, "prompt_tokens": 100, "output_tokens": 50}
    second = {"busy_seconds": 4.0, "prompt_tokens": 200, "output_tokens": 70}
    with mock.patch.object(time, "monotonic", side_effect=[10.0, 14.0, 18.0, 20.0]):
        assert rates.added_to(first) == first
        seen = rates.added_to(second)
        assert (seen["busy"], seen["prompt_tokens_per_second"], seen["tokens_per_second"]) == (0.75, 25.0, 5.0)
        # Nothing happened since.
        assert rates.added_to(second)["busy"] == 0
        # A step of nine seconds ended in the last two.
        assert rates.added_to(second | {"busy_seconds": 13.0})["busy"] == 1.0


@pytest.mark.parametrize("stats", [{}])
def test_rates_are_absent_without_an_engine(stats: dict[str, object]) -> None:
    rates = Rates()
    assert rates.added_to(stats) == {}
    assert rates.added_to(stats) == {}
