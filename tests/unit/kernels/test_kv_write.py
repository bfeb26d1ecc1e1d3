"""Cache writes, plain and turned, against their references."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.float8 import LARGEST, as_bits, dequantize_reference, quantize_reference
from kernels.kv_write import rotate_and_write_kv, write_kv, write_kv_reference
from kernels.paged_layout import LayerCache
from kernels.rms_norm import HeadNorms
from kernels.rotary import rotate
from tests.unit.kernels.references import rotate_and_write_kv_reference, rotate_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def poisoned(dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, float8: bool) -> LayerCache:
    """A cache of four blocks of eight positions, three heads."""
    made = [torch.full((4, 8, 3, size), float("nan"), dtype=dtype, device=device) for size in (dim, value_dim)]
    if not float8:
        return LayerCache(*made)
    scales = [torch.full((4, 3, 8), 255, dtype=torch.uint8, device=device) for _ in range(2)]
    return LayerCache(*(numbers.to(torch.float8_e4m3fn) for numbers in made), *scales)


def keys_of(cache: LayerCache) -> Tensor:
    """A float8 cache's keys as numbers."""
    assert cache.key_scales is not None
    return dequantize_reference(cache.keys, cache.key_scales)


def values_of(cache: LayerCache) -> list[Tensor]:
    assert cache.value_scales is not None
    return [cache.values, cache.value_scales]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit by bit, NaN and all."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(as_bits(one).nan_to_num(7.0), as_bits(other).nan_to_num(7.0))


@pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (33, 33), (24, 80)])
def test_keys_and_values_are_written_to_their_slots(
    dim: int, value_dim: int, dtype: torch.dtype, float8: bool, device: torch.device
) -> None:
    key = torch.randn(5, 3, dim, device=device).to(dtype)
    # A slice of something wider, as a fused projection gives.
    value = torch.randn(5, 7, value_dim + 3, device=device).to(dtype)[:, 2:5, :value_dim]
    slots = torch.tensor([31, 0, 7, 8, 19], device=device)
    found, expected = (poisoned(dim, value_dim, dtype, device, float8=float8) for _ in range(2))
    write_kv(key, value, found, slots)
    write_kv_reference(key, value, expected, slots)
    assert len(found.tensors) == (4 if float8 else 2)
    same(found.tensors, expected.tensors)


def test_negative_slots_write_nothing(device: torch.device) -> None:
    key = torch.randn(3, 3, 16, device=device)
    found, expected = (poisoned(16, 16, torch.float32, device, float8=False) for _ in range(2))
    write_kv(key, key, found, torch.tensor([-1, 4, -1], device=device))
    write_kv_reference(key[1:2], key[1:2], expected, torch.tensor([4], device=device))
    same(found.tensors, expected.tensors)


def stored(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel makes of `[T, 3, D]`, and the scales' exponents, `[T, 3]`."""
    cache = torch.zeros(len(numbers), 1, *numbers.shape[1:], device=numbers.device).to(torch.float8_e4m3fn)
    exponents = torch.zeros(len(numbers), 3, 1, dtype=torch.uint8, device=numbers.device)
    slots = torch.arange(len(numbers), device=numbers.device)
    write_kv(numbers, numbers, LayerCache(cache, cache, exponents, exponents), slots)
    return cache[:, 0], exponents[..., 0]


def test_float8_rounds_as_torch_does(device: torch.device) -> None:
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].sort().values
    # Every number, those just beside, every middle between two and those just beside it.
    middles = (exact[1:] + exact[:-1]) / 2
    numbers = torch.cat([exact, middles, torch.tensor([1e-9, -0.0])])
    numbers = torch.cat([numbers, numbers * (1 + 2**-22), numbers * (1 - 2**-22)]).clamp(-LARGEST, LARGEST)
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 45)).view(-1, 3, 15)
    # Beside the largest number the scale is 1.
    numbers = torch.nn.functional.pad(numbers, (1, 0), value=LARGEST).to(device)
    found, exponents = stored(numbers)
    assert exponents.eq(127).all()
    same([found], [numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)])


def test_float8_write_covers_the_largest_and_smallest_numbers(device: torch.device) -> None:
    """The bound that `float8.py` gives, from the smallest normal number to the largest, and zero."""
    largest = torch.tensor(
        [1.2e-38, 1e-20, 3e-5, 0.5, 447.9, 448.0, 448.1, 512.0, 5e3, 6.5e4, 3e38, 0.0], device=device
    )
    numbers = (torch.rand(len(largest), 3, 16, device=device) * 2 - 1) * 10.0 ** -torch.arange(16, device=device)
    numbers[..., 3] = -1.0
    numbers *= largest[:, None, None]
    found, exponents = stored(numbers)
    same([found, exponents], list(quantize_reference(numbers)))
    scale = 2.0 ** (exponents.float() - 127)
    off = (dequantize_reference(found[:, None], exponents[..., None])[:, 0] - numbers).abs()
    assert (off <= torch.maximum(numbers.abs() / 16, scale[..., None] / 1024)).all()
    # No scale is larger than it has to be, where it could be smaller.
    assert ((scale < largest[:, None] / 224 * (1 + 1e-6)) | (exponents == 1)).all()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (80, 80), (33, 10)])
def test_rotate_and_write_kv_equals_its_reference(
    dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool, device: torch.device
) -> None:
    heads = torch.randn(3, 9, dim + 5, device=device).to(dtype)[:, 1:6, :dim]
    angles = torch.randn(3, 1, rotary_dim // 2, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = rotate(heads, cos, sin, interleaved=interleaved)
    expected = rotate_reference(heads, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[..., rotary_dim:], heads[..., rotary_dim:])


@pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotated_keys_are_written_to_their_slots(interleaved: bool, float8: bool, device: torch.device) -> None:
    dtype = torch.bfloat16
    fused = torch.randn(4, 12, 24, device=device).to(dtype)
    query, key, value = fused[:, :6], fused[:, 6:9], fused[:, 9:]
    angles = torch.randn(4, 1, 8, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([3, 30, 12, 13], device=device)
    found, expected = (poisoned(24, 24, dtype, device, float8=float8) for _ in range(2))
    turned = rotate_and_write_kv(query, key, value, cos, sin, found, slots, interleaved=interleaved)
    reference = rotate_and_write_kv_reference(query, key, value, cos, sin, expected, slots, interleaved=interleaved)
    torch.testing.assert_close(turned, reference)
    if float8:
        # The interpreter and a GPU's fused products may round a turned key to its neighbour in bfloat16, and then here.
        same(values_of(found), values_of(expected))
        torch.testing.assert_close(keys_of(found), keys_of(expected), rtol=1 / 8, atol=1 / 512, equal_nan=True)
    else:
        torch.testing.assert_close(found.tensors, expected.tensors, equal_nan=True)


@pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normalized_before_they_are_rotated(
    dtype: torch.dtype, interleaved: bool, float8: bool, device: torch.device
) -> None:
    """Heads of 33, of which 10 turn: the norm is over all of them, and each has its weight."""
    fused = (torch.randn(4, 11, 33, device=device) * 5).to(dtype)
    query, key, value = fused[:, :5], fused[:, 5:8], fused[:, 8:]
    angles = torch.randn(4, 1, 5, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([3, 30, 12, 13], device=device)
    for offset in (0.0, 1.0):
        norms = HeadNorms(*(torch.randn(2, 33, device=device) + 1).to(dtype), 1e-6, offset)
        found, expected = (poisoned(33, 33, dtype, device, float8=float8) for _ in range(2))
        turned = rotate_and_write_kv(query, key, value, cos, sin, found, slots, interleaved=interleaved, norms=norms)
        reference = rotate_and_write_kv_reference(
            query, key, value, cos, sin, expected, slots, interleaved=interleaved, norms=norms
        )
        # A head's norm may round to the neighbour, and what is turned with it.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(turned, reference, rtol=tolerance, atol=8 * tolerance)
        if float8:
            same(values_of(found), values_of(expected))
            torch.testing.assert_close(keys_of(found), keys_of(expected), rtol=1 / 8, atol=1 / 8, equal_nan=True)
        else:
            torch.testing.assert_close(
                found.tensors, expected.tensors, rtol=tolerance, atol=8 * tolerance, equal_nan=True
            )


def test_padding_tokens_are_rotated_but_not_written(device: torch.device) -> None:
    heads = torch.randn(2, 3, 16, device=device)
    angles = torch.randn(2, 1, 8, device=device)
    found = poisoned(16, 16, torch.float32, device, float8=False)
    slots = torch.tensor([-1, -1], device=device)
    turned = rotate_and_write_kv(heads, heads, heads, angles.cos(), angles.sin(), found, slots)
    assert turned.isfinite().all()
    assert all(numbers.isnan().all() for numbers in found.tensors)
