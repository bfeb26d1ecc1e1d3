"""A device that has failed: no later work on it can succeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import EngineFailed


@contextmanager
def device_errors_as_engine_failed() -> Iterator[None]:
    """Raise `EngineFailed` in place of an error that the device reports, from a launch or from waiting for it."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineFailed(f"the device failed: {error}") from error
