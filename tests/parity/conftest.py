from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.comparing import Reference, ragged_prompts, reference_greedy
from tests.parity.tiny_models import TinyModel

NUM_TOKENS = 24


@dataclass(frozen=True)
class Saved:
    """A model on disk, and what transformers generates with it."""

    directory: Path
    references: list[Reference]

    @property
    def prompts(self) -> list[list[int]]:
        return [reference.prompt for reference in self.references]


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
