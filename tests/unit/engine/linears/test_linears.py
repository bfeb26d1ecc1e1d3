"""Exchanged linear layers against those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine import EngineConfig
from engine.errors import ModelError
from engine.linears import prepare_linears
from engine.linears.onednn import OneDNNInt8Linear
from engine.linears.packed import PackedEmbedding, PackedLinear
from engine.models.decoder import Decoder
from engine.models.layers import Activated, GatedMLP
from kernels.cpu.library import CpuKernelsUnavailable
from kernels.cpu.linear import quantize_rows, quantized_linear_reference
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
        self.mlps = nn.Sequential(GatedMLP(24, 96, "silu", bias=True), GatedMLP(24, 33, "gelu_pytorch_tanh"))

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
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_int8_is_refused_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.linears.choice as choice

    def unavailable() -> None:
        raise CpuKernelsUnavailable("no C++ compiler is installed")

    monkeypatch.setattr(choice, "library", unavailable)
    monkeypatch.setattr(OneDNNInt8Linear, "is_exact", lambda: False)
    with pytest.raises(ModelError, match=r"int8.*no C\+\+ compiler"):
        prepare_linears(Model(), EngineConfig(quantization="int8"), torch.device("cpu"))


def test_int8_uses_onednn_when_the_processor_multiplies_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneDNNInt8Linear, "is_exact", lambda: True)
    model = Model().requires_grad_(False)
    prepare_linears(model, EngineConfig(quantization="int8"), torch.device("cpu"))
    assert isinstance(model.first, OneDNNInt8Linear)
    assert not isinstance(model.head, OneDNNInt8Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 8), (1, 33, 17), (5, 80, 240)])
def test_int8_in_onednn_is_int8_in_torch(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    # Small beside the first column, which sets the scale: no pair of products overflows where there is no VNNI.
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(dtype)
    layer.weight.copy_(torch.randint(-60, 61, layer.weight.shape))
    layer.weight[:, 0] = 127
    hidden = torch.randint(-100, 101, (rows, inputs)).to(dtype)
    hidden[:, 0] = -127
    expected = quantized_linear_reference(hidden, *quantize_rows(layer.weight), layer.bias)
    found = OneDNNInt8Linear(layer)(hidden)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6)


def test_non_finite_row_does_not_change_other_rows() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    hidden = torch.zeros(3, 8)
    hidden[1, 3] = float("nan")
    found = OneDNNInt8Linear(layer)(hidden)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
