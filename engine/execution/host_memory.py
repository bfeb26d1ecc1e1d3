"""Memory of this process: how much it has, and how a finished engine's part goes back to the system."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from engine.linears.replace import return_memory


def resident_memory() -> int:
    """Bytes of main memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Give back what engines took that nothing refers to any more, of main memory and of a GPU's."""
    gc.collect()  # an engine's parts refer to each other
    return_memory()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
