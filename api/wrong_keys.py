"""A bound on wrong keys: an address that tries one after the other waits."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

MOST = 10  # wrong keys
WINDOW = 60.0  # seconds in which an address may try so many
ADDRESSES = 10_000  # remembered at once; the oldest makes way
TOLD = 10  # blocked addresses that are told in a `WINDOW`: an attacker with many must not fill the audit log


class WrongKeys:
    """When each address last tried a wrong key, in this process."""

    def __init__(self) -> None:
        self._tried: OrderedDict[str, deque[float]] = OrderedDict()
        self._told: deque[float] = deque()

    def is_blocked(self, address: str) -> bool:
        """Whether the address has used up its tries."""
        tried = self._tried.get(address)
        if tried is None:
            return False
        while tried and tried[0] < time.monotonic() - WINDOW:
            tried.popleft()
        return len(tried) >= MOST

    def note(self, address: str) -> bool:
        """A wrong key came from the address. Whether that was its last try, and is to be told."""
        self._tried.setdefault(address, deque(maxlen=MOST)).append(time.monotonic())
        self._tried.move_to_end(address)
        if len(self._tried) > ADDRESSES:
            self._tried.popitem(last=False)
        if not self.is_blocked(address):
            return False
        now = time.monotonic()
        while self._told and self._told[0] < now - WINDOW:
            self._told.popleft()
        if len(self._told) == TOLD:
            return False
        self._told.append(now)
        return True
