"""Ops choose their implementation: the kernel where `use_triton` says so, else the fallback, with the same result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.expert_mlp import expert_mlp
from kernels.gated_activation import gated_activation
from kernels.launch import Launch
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.log_probs import log_probs
from kernels.penalties import penalize
from kernels.quantized_matmul import QuantizedWeight, quantized_matmul, quantized_weight
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotate
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import Filters

Result = Tensor | tuple[Tensor, ...]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def penalized(device: torch.device) -> Tensor:
    logits = randn(2, 50).to(device)
    rows, tokens, counts = torch.tensor([[0, 0, 1], [3, 4, 3], [1, 0, 2]], device=device)
    penalize(logits, rows, tokens, counts, *torch.tensor([[1.5, 2.0], [0.5, 0.1], [0.3, 0.2]], device=device))
    return logits


def sampled(device: torch.device) -> Tensor:
    """A greedy row, one that any token may come of, a filtered one, one that is not finite, and one without a token."""
    logits = randn(5, 300).to(device)
    logits[3, 7], logits[4] = float("nan"), float("-inf")
    whole = torch.arange(5, device=device)
    return sample(
        logits,
        torch.tensor([0.0, 1.0, 0.8, 1.0, 1.0], device=device),
        torch.tensor([300, 300, 20, 300, 300], device=device),
        torch.tensor([1.0, 1.0, 0.9, 1.0, 1.0], device=device),
        torch.zeros(5, device=device),
        whole + 11,
        whole,
        whole % 2,
        filters=Filters(top_k=20, top_p=True, min_p=False),
    )


def weight(device: torch.device) -> QuantizedWeight:
    """Of 32 inputs and 5 outputs, in 4 bits."""
    numbers = (randn(5, 32).abs() * 5).clamp(max=15).to(torch.uint8)
    return quantized_weight(numbers.to(device), randn(2, 5).to(device), kind="int4", group_size=16)


OPS: dict[str, Callable[[torch.device], Result]] = {
    "rms_norm": lambda on: rms_norm(randn(3, 40).to(on), randn(40, seed=1).to(on), 1e-5),
    "rms_norm, offset": lambda on: rms_norm(randn(3, 40).to(on), randn(40, seed=1).to(on), 1e-5, offset=1.0),
    "add_rms_norm": lambda on: add_rms_norm(randn(3, 40).to(on), randn(3, 40, seed=1).to(on), randn(40).to(on), 1e-5),
    "layer_norm": lambda on: layer_norm(randn(3, 40).to(on), randn(40).to(on), randn(40, seed=1).to(on), 1e-5),
    "add_layer_norm": lambda on: add_layer_norm(
        randn(3, 40).to(on), randn(3, 40, seed=1).to(on), randn(40).to(on), None, 1e-5
    ),
    "gated_activation": lambda on: gated_activation(randn(3, 80).to(on), "silu"),
    "rotate": lambda on: rotate(randn(3, 4, 24).to(on), randn(3, 1, 8).to(on), randn(3, 1, 8, seed=1).to(on)),
    "rotate, interleaved": lambda on: rotate(
        randn(3, 4, 24).to(on), randn(3, 1, 8).to(on), randn(3, 1, 8, seed=1).to(on), interleaved=True
    ),
    "expert_mlp": lambda on: expert_mlp(
        randn(5, 16).to(on), randn(5, 4).to(on), randn(4, 24, 16).to(on), randn(4, 16, 12).to(on), 2, normalized=True
    ),
    "quantized_matmul": lambda on: quantized_matmul(randn(3, 32).to(on), weight(on), randn(5).to(on)),
    "log_probs": lambda on: log_probs(randn(3, 60).to(on), torch.tensor([1, 2, 59], device=on), 4),
    "penalize": penalized,
    "sample": sampled,
    "argmax": lambda on: argmax(randn(3, 60).to(on)),
}


@pytest.mark.parametrize("name", list(OPS))
def test_op_gives_the_same_with_its_kernel_and_with_its_fallback(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launched.append(launch.kernel.__name__), run(launch))[1])
    found = OPS[name](device)
    assert launched
    launched.clear()
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: False)
    expected = OPS[name](device)
    assert not launched
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_use_triton_is_true_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what lets the interpreter run them here
    assert not dispatch.use_triton(torch.empty(1))


def test_gated_activation_falls_back_when_kernels_lack_the_gate(device: torch.device) -> None:
    x = randn(3, 80).to(device)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(gated_activation(x, "relu"), gate.relu() * up)
