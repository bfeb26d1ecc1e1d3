"""Norms, activations, log-probabilities and penalties against their references."""

from __future__ import annotations

import pytest
import torch

from kernels.gated_activation import ACTIVATIONS, gated_activation
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.log_probs import log_probs
from kernels.penalties import penalize, penalize_reference
from kernels.rms_norm import add_rms_norm, rms_norm
from tests.unit.kernels.references import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    gated_activation_reference,
    layer_norm_reference,
    log_probs_reference,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 33, 240, 4099]


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(device)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype is expected.dtype
    # One rounding to the next number of the type, at most.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_equals_its_reference(size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = randn(3, size + 5, device=device, dtype=dtype)[:, :size], randn(3, size, device=device, dtype=dtype)
    weight = randn(size, device=device, dtype=dtype)
    for offset in (0.0, 1.0):
        close(rms_norm(x, weight, 1e-5, offset=offset), rms_norm_reference(x, weight, 1e-5, offset=offset))
    for found, expected in zip(
        add_rms_norm(x, residual, weight, 1e-5), add_rms_norm_reference(x, residual, weight, 1e-5), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("heads", [1, 7])
def test_rms_norm_equals_its_reference_on_heads(heads: int, device: torch.device) -> None:
    x = randn(5, heads + 3, 80, device=device)[:, 2 : heads + 2]
    weight = randn(80, device=device)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_equals_its_reference(size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = randn(3, size + 5, device=device, dtype=dtype)[:, :size], randn(3, size, device=device, dtype=dtype)
    weight, bias = randn(size, device=device, dtype=dtype), randn(size, device=device, dtype=dtype, seed=1)
    if dtype is torch.float32:
        # Far from zero: a variance that is a difference of two large numbers would show.
        x = x + 30
    close(layer_norm(x, weight, bias, 1e-5), layer_norm_reference(x, weight, bias, 1e-5))
    close(layer_norm(x, weight, None, 1e-5), layer_norm_reference(x, weight, None, 1e-5))
    for found, expected in zip(
        add_layer_norm(x, residual, weight, bias, 1e-5),
        add_layer_norm_reference(x, residual, weight, bias, 1e-5),
        strict=True,
    ):
        close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_equals_its_reference(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    for size in (1, 328, 1100):
        x = (randn(2, 2 * size, device=device) * 4).to(dtype)
        close(gated_activation(x, activation), gated_activation_reference(x, activation))


@pytest.mark.parametrize("vocab", [1, 1003, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_equal_their_reference(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = (randn(3, vocab, device=device) * 10).to(dtype)
    logits[1, : vocab // 2] = float("-inf")
    tokens = torch.tensor([0, vocab - 1, vocab // 2], device=device)
    num_top = min(5, vocab)
    found, expected = log_probs(logits, tokens, num_top), log_probs_reference(logits, tokens, num_top)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-5)
    if dtype is torch.float32:
        assert found[2].tolist() == expected[2].tolist()


@pytest.mark.parametrize("entries", [1, 300])
def test_penalties_equal_their_reference(entries: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = randn(4, 500, device=device)
    flat = torch.randperm(2000, generator=generator)[:entries].to(device)
    rows, tokens = flat // 500, flat % 500
    counts = torch.randint(0, 3, (entries,), generator=generator).to(device)
    repetition, frequency, presence = (randn(4, device=device, seed=seed).abs() + 0.5 for seed in range(3))
    found, expected = logits.clone(), logits.clone()
    penalize(found, rows, tokens, counts, repetition, frequency, presence)
    penalize_reference(expected, rows, tokens, counts, repetition, frequency, presence)
    torch.testing.assert_close(found, expected)
    assert int((found != logits).sum()) <= entries
