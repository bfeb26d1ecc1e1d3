"""CUDA graphs on ranks that share a model: captured on all of them or on none."""

from __future__ import annotations

import torch

from engine.device.collectives import Group
from engine.device.cuda_graphs import Capture, Work, ran_out_of_memory

_NO_MEMORY, _FAILED, _CAPTURED = range(3)


class AgreedCapture:
    """A rank's capture, which succeeds where it succeeds on every rank; implements `Capture`.

    A graph runs once when it was captured. Ranks on which that failed would not take part in its sums.
    """

    def __init__(self, capture: Capture, group: Group) -> None:
        self._capture = capture
        self._group = group

    def free_bytes(self) -> int:
        """The least of all ranks', so that all stop capturing at the same graph."""
        return self._group.minimum(self._capture.free_bytes())

    def capture(self, work: Work) -> Work:
        """See `Capture.capture`; raises what the worst-off rank raises."""
        failure: RuntimeError | None = None
        replay = work
        try:
            replay = self._capture.capture(work)
            outcome = _CAPTURED
        except RuntimeError as error:
            failure = error
            outcome = _NO_MEMORY if ran_out_of_memory(error) else _FAILED
        worst = self._group.minimum(outcome)
        if worst == _NO_MEMORY:
            raise torch.OutOfMemoryError("a rank has no memory for it") from failure
        if worst == _FAILED:
            raise failure or RuntimeError("it failed on another rank")
        return replay
