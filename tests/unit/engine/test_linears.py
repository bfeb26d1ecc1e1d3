"""Exchanged linear layers against those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine import EngineConfig
from engine.linears import prepare_linears


class Model(nn.Module):
    """A tied head, a layer in two places, one with a bias, and a subclass."""

    def __init__(self) -> None:
        super().__init__()

        class Special(nn.Linear):
            def forward(self, hidden: torch.Tensor) -> torch.Tensor:
                return super().forward(hidden) + 1

        self.embedding = nn.Embedding(50, 33)
        self.first = nn.Linear(33, 70)
        self.second = nn.Sequential(nn.GELU(), nn.Linear(70, 33, bias=False))
        self.again = self.second[1]
        self.special = Special(33, 33)
        self.head = nn.Linear(33, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(self.embedding(token_ids)))
        result: torch.Tensor = self.head(self.special(self.again(torch.cat((hidden, hidden, hidden), -1)[..., :70])))
        return result


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
def test_the_same_comes_out(rows: int) -> None:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    token_ids = torch.randint(50, (rows,))
    expected = model(token_ids)
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    torch.testing.assert_close(model(token_ids), expected, atol=1e-5, rtol=1e-5)
    assert model.again is model.second[1]


def test_exchanged_layers_keep_no_second_copy() -> None:
    model = Model().requires_grad_(False)
    first = model.first
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    assert model.first is not first
    assert not hasattr(first, "weight")
