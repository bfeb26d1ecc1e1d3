"""Tokens a second over the last seconds that had work in them."""

from __future__ import annotations

from collections import deque

_WINDOW_SECONDS = 10.0
_SLICE_SECONDS = 0.5


class Throughput:
    """A sliding window over steps: time spent in them, and tokens that came of it. Idle time does not count.

    Steps are summed in slices, so that the window stays small however short they are.
    """

    def __init__(self) -> None:
        self._slices: deque[list[float]] = deque()
        self._sum = [0.0, 0.0, 0.0]

    def record(self, seconds: float, output_tokens: int, computed_tokens: int) -> None:
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
