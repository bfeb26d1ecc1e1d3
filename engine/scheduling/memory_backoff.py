"""How many tokens a step may have, learned from steps for which the memory did not suffice.

The limit of the configuration was measured with some model on some GPU, but memory can be short later: another process
takes some, or fragments are left that nothing fits. Then steps become half as large, sequences that have no place in
them go back to the queue, and after a while of peace the limit is raised again, more patiently each time it was wrong.
"""

from __future__ import annotations

_PATIENCE, _MOST_PATIENCE = 64, 4096  # steps


class MemoryBackoff:
    """The present limit, `tokens`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._patience = _PATIENCE
        self._quiet = 0
        self.tokens = most

    def shrink(self, too_many: int) -> None:
        """A step of `too_many` tokens ran out of memory."""
        self.tokens = max(1, min(self.tokens, too_many) // 2)
        self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._quiet = 0

    def record_success(self) -> None:
        """A step went well."""
        if self.tokens == self._most:
            return
        self._quiet += 1
        if self._quiet >= self._patience:
            self.tokens = min(2 * self.tokens, self._most)
            self._quiet = 0
