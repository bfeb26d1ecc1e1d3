from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.comparing import Reference, ragged_prompts, reference_greedy
from tests.parity.tiny_models import TinyModel

NUM_TOKENS = 32


@dataclass(frozen=True)
class Saved:
    """A model on disk, and what transformers generates with it."""

    directory: Path
    references: list[Reference]

    @property
    def prompts(self) -> list[list[int]]:
        return [reference.prompt for reference in self.references]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On tiny tensors, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel, torch.dtype], Saved]:
    """Saves a model and asks transformers for its tokens, once for all tests."""

    @cache
    def save(model: TinyModel, dtype: torch.dtype = torch.float32) -> Saved:
        directory = tmp_path_factory.mktemp(model.name)
        reference = model.save(directory, dtype)
        with torch.no_grad():
            return Saved(
                directory,
                reference_greedy(reference, ragged_prompts(), NUM_TOKENS),
            )

    return save
