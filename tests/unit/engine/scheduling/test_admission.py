"""The forecast of block use, against a simulation token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.admission import BlockUsageForecast, LengthStatistics


def forecast(sequences: list[tuple[int, int]], shared: int = 0, block_size: int = 1) -> BlockUsageForecast:
    own = np.array([own for own, _ in sequences], dtype=np.float64)
    remaining = np.array([left for _, left in sequences], dtype=np.float64)
    return BlockUsageForecast(own, remaining, shared_blocks=shared, block_size=block_size)


def simulated_peak(sequences: list[tuple[int, int]], shared: int = 0) -> int:
    """Blocks of one position, one token a step; a sequence leaves after its last."""
    steps = range(1, max((left for _, left in sequences), default=0) + 1)
    return shared + max((sum(own + step for own, left in sequences if left >= step) for step in steps), default=0)


SEQUENCES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=8)


@settings(deadline=None)
@given(sequences=SEQUENCES, shared=st.integers(0, 5))
def test_forecast_peak_equals_the_simulation(sequences: list[tuple[int, int]], shared: int) -> None:
    assert forecast(sequences, shared).peak == simulated_peak(sequences, shared)


@settings(deadline=None)
@given(sequences=SEQUENCES, capacity=st.integers(0, 120))
def test_forecast_admits_while_the_peak_fits(sequences: list[tuple[int, int]], capacity: int) -> None:
    growing, admitted = forecast([]), list[tuple[int, int]]()
    for own, left in sequences:
        fits = simulated_peak([*admitted, (own, left)]) <= capacity
        assert growing.admit(own, left, 0, capacity) is fits
        if fits:
            admitted.append((own, left))
    assert growing.peak == simulated_peak(admitted)


def test_forecast_reuses_the_blocks_of_outputs_that_end() -> None:
    """Twelve blocks hold what would reserve sixteen, because one ends before the other is long."""
    assert forecast([(4, 4), (0, 8)]).peak == 12


class TestRequestSizes:
    def sizes(self, outputs: list[int]) -> LengthStatistics:
        sizes = LengthStatistics(4096)
        for output in outputs:
            sizes.record(10, output)
        return sizes

    def remaining(self, sizes: LengthStatistics, num_output: float, max_output: float) -> float:
        return float(sizes.remaining(np.array([num_output]), np.array([max_output]))[0])

    def test_remaining_length_is_a_guess_within_max_tokens_when_nothing_finished(self) -> None:
        sizes = self.sizes([])
        assert self.remaining(sizes, 0, 100) == 100
        assert self.remaining(sizes, 0, 10_000) == sizes.mean_output == 256
        assert self.remaining(sizes, 1000, 10_000) == 1000

    def test_length_guess_is_within_the_context(self) -> None:
        assert LengthStatistics(64).mean_output == 32
        assert LengthStatistics(64).mean_prompt == 16

    def test_remaining_length_is_the_mean_of_longer_outputs(self) -> None:
        sizes = self.sizes([10] * 50 + [100] * 50)
        assert self.remaining(sizes, 0, 10_000) == 55
        assert self.remaining(sizes, 10, 10_000) == 90
        assert self.remaining(sizes, 99, 10_000) == 1
        assert self.remaining(sizes, 0, 20) == 20
        assert sizes.mean_prompt == 10

    def test_remaining_length_is_the_length_so_far_beyond_the_longest_output(self) -> None:
        assert self.remaining(self.sizes([10] * 50), 30, 10_000) == 30

    def test_length_statistics_forget_old_outputs(self) -> None:
        sizes = self.sizes([1000] * 100 + [10] * 2048)
        assert sizes.mean_output == 10
