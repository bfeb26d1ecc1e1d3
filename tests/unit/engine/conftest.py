"""Engine tests work on tiny tensors, where threads only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# A machine for GPU tests may lack what grammars are compiled with.
collect_ignore = [] if find_spec("llguidance") else ["grammar", "test_structured_generation.py"]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
