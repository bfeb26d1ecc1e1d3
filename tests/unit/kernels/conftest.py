"""The kernels' tests run on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.device import interprets


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available() and not interprets():
        return torch.device("cuda")
    if not interprets():
        pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run their kernels, also on the CPU."""
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
