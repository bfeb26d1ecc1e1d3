"""Exchanged linear layers against those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine import EngineConfig
from engine.device.collectives import ALONE
from engine.errors import ModelError
from engine.linears import prepare_linears
from engine.linears.packed import PackedEmbedding, PackedLinear
from engine.models.decoder import Decoder
from engine.models.layers import Activated, GatedMLP
from kernels.cpu.library import CpuKernelsUnavailable
from tests.unit.kernels.cpu_variants import cpu_library


class Model(Decoder):
    """A tied head, a layer in two places, one with a bias, one with an activation function, and a subclass."""

    vocab_size = 50

    def __init__(self) -> None:
        super().__init__()

        class Special(nn.Linear):
            def forward(self, hidden: torch.Tensor) -> torch.Tensor:
                return super().forward(hidden) + 1

        self.embedding = nn.Embedding(50, 33)
        self.first = nn.Linear(33, 70)
        self.second = nn.Sequential(nn.GELU(), nn.Linear(70, 33, bias=False))
        self.again = self.second[1]
        self.activated = Activated(nn.Linear(33, 33), "gelu_new")
        self.special = Special(33, 33)
        self.head = nn.Linear(33, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        hidden = self.activated(self.second(self.first(self.embedding(token_ids))))
        result: torch.Tensor = self.head(self.special(self.again(torch.cat((hidden, hidden, hidden), -1)[..., :70])))
        return result


@pytest.fixture(params=["kernels", "no compiler"])
def may_compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the kernels in C++, and where they are not to be had."""
    import engine.linears.choice as choice

    def unavailable() -> None:
        raise CpuKernelsUnavailable("no C++ compiler is installed")

    if request.param == "no compiler":
        monkeypatch.setattr(choice, "library", unavailable)
    else:
        cpu_library("native")
    return bool(request.param == "kernels")


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.usefixtures("may_compile")
def test_replaced_linears_give_the_same_output(rows: int) -> None:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    token_ids = torch.randint(50, (rows,))
    expected = model(token_ids)
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    torch.testing.assert_close(model(token_ids), expected, atol=1e-5, rtol=1e-5)
    assert model.again is model.second[1]


class GatedModel(Decoder):
    """Two MLPs with a gate: of whole panels in all widths, and not."""

    vocab_size = 24

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.Sequential(
            GatedMLP(24, 96, "silu", ALONE, bias=True), GatedMLP(24, 33, "gelu_pytorch_tanh", ALONE)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        result: torch.Tensor = self.mlps(hidden)
        return result


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.usefixtures("may_compile")
def test_replaced_gates_give_the_same_output(rows: int) -> None:
    torch.manual_seed(0)
    model = GatedModel().requires_grad_(False)
    hidden = torch.randn(rows, 24)
    expected = model(hidden)
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    torch.testing.assert_close(model(hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("may_compile")
def test_replaced_layers_keep_no_second_copy() -> None:
    model = Model().requires_grad_(False)
    first = model.first
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    assert model.first is not first
    assert not hasattr(first, "weight")


def test_tied_embedding_reads_the_packed_head() -> None:
    cpu_library("native")
    model = Model().requires_grad_(False)
    expected = model.embedding(torch.arange(50))
    prepare_linears(model, EngineConfig(), torch.device("cpu"))
    if isinstance(model.head, PackedLinear):
        assert isinstance(model.embedding, PackedEmbedding)
        assert not [name for name, _ in model.named_parameters() if "embedding" in name or "head" in name]
    assert torch.equal(model.embedding(torch.arange(50)), expected)


def test_int8_leaves_routers_and_the_head_unquantized() -> None:
    cpu_library("native")
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    expected = model(torch.arange(50))
    prepare_linears(model, EngineConfig(quantization="int8"), torch.device("cpu"))
    stored = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert stored["first"] is torch.int8
    assert all(dtype is not torch.int8 for name, dtype in stored.items() if name != "first")
    found = model(torch.arange(50))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()


def test_int8_is_refused_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.linears.choice as choice

    def unavailable() -> None:
        raise CpuKernelsUnavailable("no C++ compiler is installed")

    monkeypatch.setattr(choice, "library", unavailable)
    with pytest.raises(ModelError, match=r"int8.*no C\+\+ compiler"):
        prepare_linears(Model(), EngineConfig(quantization="int8"), torch.device("cpu"))
