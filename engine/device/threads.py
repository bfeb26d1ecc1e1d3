"""How many threads torch computes with, where that may change a result.

Element by element, torch computes whole vectors one way and what is left over at the end of a thread's share another
way, and the two may differ in the last bit. Where shares end depends on the number of threads. Products of matrices do
not have this flaw, and are where threads pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Threads:
    """One thread for a forward pass, all of them for what asks; shared by the parts of one engine's model."""

    def __init__(self) -> None:
        self._count = torch.get_num_threads()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Everything inside runs in one thread, `all` excepted."""
        self._count = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._count)

    @contextmanager
    def all(self) -> Iterator[None]:
        """Inside `one`: as many threads as there were outside."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
