"""How far the weights are, as log records: one a tensor at DEBUG, one every few seconds at INFO."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two lines at INFO
GB = 1e9


class LoadProgress:
    """Counts the bytes that were read of `total`. Its records carry both as `loaded_bytes` and `total_bytes`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._loaded = 0
        self._reported = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Report that a tensor of so many bytes was read."""
        self._loaded += num_bytes
        now = time.monotonic()
        level = logging.INFO if now - self._reported >= INTERVAL else logging.DEBUG
        if level == logging.INFO:
            self._reported = now
        logger.log(
            level,
            "weights: %.0f%% of %.1f GB",
            100 * self._loaded / max(self._total, 1),
            self._total / GB,
            extra={"loaded_bytes": self._loaded, "total_bytes": self._total},
        )
