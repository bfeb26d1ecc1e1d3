"""What an engine did between two heartbeats, from its counters."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Rates:
    """Turns the counters of `EngineStats` into shares and rates over the time since the last look."""

    def __init__(self) -> None:
        self._last: tuple[float, Mapping[str, object]] | None = None

    def added_to(self, stats: Mapping[str, object]) -> Mapping[str, object]:
        """`stats` with `busy` (share of the time inside steps, 0 to 1), `prompt_tokens_per_second` and
        `tokens_per_second` (generated ones). They are absent at the first look, and while no engine is loaded."""
        now = time.monotonic()
        last, self._last = self._last, (now, stats) if stats else None
        if last is None or not stats or now <= last[0]:
            return stats

        def rate(counter: str) -> float:
            change = float(str(stats[counter])) - float(str(last[1][counter]))
            return max(0.0, change / (now - last[0]))

        # A step that began before the last look is counted whole when it ends.
        return {
            **stats,
            "busy": min(1.0, rate("busy_seconds")),
            "prompt_tokens_per_second": rate("prompt_tokens"),
            "tokens_per_second": rate("output_tokens"),
        }
