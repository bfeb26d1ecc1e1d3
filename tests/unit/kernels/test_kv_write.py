"""Cache writes, plain and turned, against their twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.float8 import as_bits, quantize_torch
from kernels.kv_write import rotate_and_write_kv, rotate_and_write_kv_torch, write_kv, write_kv_torch
from kernels.rotary import rotate, rotate_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def caches(dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, float8: bool) -> list[Tensor]:
    made = [torch.full((4, 8, 3, size), float("nan"), dtype=dtype, device=device) for size in (dim, value_dim)]
    return [cache.to(torch.float8_e4m3fn) for cache in made] if float8 else made


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit, NaN and all."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(as_bits(one).nan_to_num(7.0), as_bits(other).nan_to_num(7.0))


@pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (33, 33), (24, 80)])
def test_writes(dim: int, value_dim: int, dtype: torch.dtype, float8: bool, device: torch.device) -> None:
    key = torch.randn(5, 3, dim, device=device).to(dtype)
    # A slice of something wider, as a fused projection gives.
    value = torch.randn(5, 7, value_dim + 3, device=device).to(dtype)[:, 2:5, :value_dim]
    slots = torch.tensor([31, 0, 7, 8, 19], device=device)
    scales: dict[str, Any] = (
        {"key_scale": torch.tensor([0.01], device=device), "value_scale": torch.tensor([0.002], device=device)}
        if float8
        else {}
    )
    found, expected = (caches(dim, value_dim, dtype, device, float8=float8) for _ in range(2))
    write_kv(key, value, *found, slots, **scales)
    write_kv_torch(key, value, *expected, slots, **scales)
    same(found, expected)


def test_negative_slots_write_nothing(device: torch.device) -> None:
    key = torch.randn(3, 3, 16, device=device)
    found, expected = (caches(16, 16, torch.float32, device, float8=False) for _ in range(2))
    write_kv(key, key, *found, torch.tensor([-1, 4, -1], device=device))
    write_kv_torch(key[1:2], key[1:2], *expected, torch.tensor([4], device=device))
    same(found, expected)


def test_float8_rounds_as_torch_does(device: torch.device) -> None:
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].sort().values
    # Every number, those just beside, every middle between two and those just beside it, and far outside.
    middles = (exact[1:] + exact[:-1]) / 2
    numbers = torch.cat([exact, middles, torch.tensor([449.0, 1e9, -1e9, 1e-9, -0.0])])
    numbers = torch.cat([numbers, numbers * (1 + 2**-22), numbers * (1 - 2**-22)])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 48)).view(-1, 3, 16).to(device)
    one = torch.ones(1, device=device)
    cache = [torch.zeros(len(numbers), 1, 3, 16, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    write_kv(numbers, numbers, *cache, torch.arange(len(numbers), device=device), key_scale=one, value_scale=one)
    same([cache[0][:, 0]], [quantize_torch(numbers, one)])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (80, 80), (33, 10)])
def test_rotations(dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    heads = torch.randn(3, 9, dim + 5, device=device).to(dtype)[:, 1:6, :dim]
    angles = torch.randn(3, 1, rotary_dim // 2, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = rotate(heads, cos, sin, interleaved=interleaved)
    expected = rotate_torch(heads, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[..., rotary_dim:], heads[..., rotary_dim:])


@pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_turned_writes(interleaved: bool, float8: bool, device: torch.device) -> None:
    dtype = torch.bfloat16
    fused = torch.randn(4, 12, 24, device=device).to(dtype)
    query, key, value = fused[:, :6], fused[:, 6:9], fused[:, 9:]
    angles = torch.randn(4, 1, 8, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scales: dict[str, Any] = (
        {"key_scale": torch.tensor([0.01], device=device), "value_scale": torch.tensor([0.002], device=device)}
        if float8
        else {}
    )
    slots = torch.tensor([3, 30, 12, 13], device=device)
    found, expected = (caches(24, 24, dtype, device, float8=float8) for _ in range(2))
    turned = rotate_and_write_kv(query, key, value, cos, sin, *found, slots, interleaved=interleaved, **scales)
    twin = rotate_and_write_kv_torch(query, key, value, cos, sin, *expected, slots, interleaved=interleaved, **scales)
    torch.testing.assert_close(turned, twin)
    if float8:
        # The interpreter and a GPU's fused products may round a turned key to its neighbour in bfloat16, and then here.
        same(found[1:], expected[1:])
        apart = (as_bits(found[0]).int() - as_bits(expected[0]).int()).abs()
        assert int(apart.max()) <= 1
    else:
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_padded_tokens_turn_but_are_not_written(device: torch.device) -> None:
    heads = torch.randn(2, 3, 16, device=device)
    angles = torch.randn(2, 1, 8, device=device)
    found = caches(16, 16, torch.float32, device, float8=False)
    turned = rotate_and_write_kv(
        heads, heads, heads, angles.cos(), angles.sin(), *found, torch.tensor([-1, -1], device=device)
    )
    assert turned.isfinite().all()
    assert all(cache.isnan().all() for cache in found)
