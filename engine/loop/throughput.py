"""How many steps and tokens there were, and tokens a second over the last seconds that had work in them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_WINDOW_SECONDS = 10.0
_SLICE_SECONDS = 0.5


@dataclass(slots=True)
class Measured:
    """What `Throughput.measure` is told of its block."""

    is_busy: bool = False
    """Whether the time counts even if no token came of it."""


class Throughput:
    """Totals, and a sliding window over steps: time spent in them, and tokens that came of it.

    Idle time does not count. Steps are summed in slices, so that the window stays small however short they are.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_output_tokens = 0
        self.num_computed_tokens = 0
        """Tokens run through the model, recomputed ones included."""
        self.busy_seconds = 0.0
        """Time inside steps, idle time left out."""
        self._slices: deque[list[float]] = deque()
        self._sum = [0.0, 0.0, 0.0]

    def count(self, *, steps: int = 0, output: int = 0, computed: int = 0) -> None:
        """Add to the totals."""
        self.num_steps += steps
        self.num_output_tokens += output
        self.num_computed_tokens += computed

    @contextmanager
    def measure(self) -> Iterator[Measured]:
        """Put the time of a block, and the tokens counted in it, into the window."""
        measured = Measured()
        began = time.perf_counter()
        output, computed = self.num_output_tokens, self.num_computed_tokens
        yield measured
        output, computed = self.num_output_tokens - output, self.num_computed_tokens - computed
        if computed or measured.is_busy:
            seconds = time.perf_counter() - began
            self.busy_seconds += seconds
            self._record(seconds, output, computed)

    def _record(self, seconds: float, output_tokens: int, computed_tokens: int) -> None:
        if not self._slices or self._slices[-1][0] >= _SLICE_SECONDS:
            self._slices.append([0.0, 0.0, 0.0])
        for place, amount in enumerate((seconds, output_tokens, computed_tokens)):
            self._slices[-1][place] += amount
            self._sum[place] += amount
        while len(self._slices) > 1 and self._sum[0] - self._slices[0][0] >= _WINDOW_SECONDS:
            oldest = self._slices.popleft()
            self._sum = [total - part for total, part in zip(self._sum, oldest, strict=True)]

    @property
    def output_per_second(self) -> float:
        return self._sum[1] / self._sum[0] if self._sum[0] else 0.0

    @property
    def computed_per_second(self) -> float:
        return self._sum[2] / self._sum[0] if self._sum[0] else 0.0
