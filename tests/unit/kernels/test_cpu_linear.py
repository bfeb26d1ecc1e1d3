"""The linear kernel in C++ against torch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.linear import GROUP, linear, pack_weight, pad_bias, quantize_weight, quantized_linear_reference
from tests.unit.kernels.cpu_variants import computing_with, cpu_library

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TYPES = list(TOLERANCE)
SHAPES = [(1, 1), (33, 70), (64, 48), (301, 129), (600, 500)]
ROWS = [1, 2, 6, 7, 13, 50, 401]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(
    params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generic", "wide"))], scope="module"
)
def library(request: pytest.FixtureRequest) -> Library:
    return cpu_library(request.param)


def draw(in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(in_features + rows)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    return torch.randn(rows, in_features).to(dtype), weight.to(dtype), torch.randn(out_features).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_torch_in_all_shapes(shape: tuple[int, int], dtype: torch.dtype, library: Library) -> None:
    for rows in ROWS:
        hidden, weight, bias = draw(*shape, rows, dtype)
        packed = pack_weight(weight, library.width)
        expected = F.linear(hidden.double(), weight.double())
        assert_close(linear(library, hidden, packed), expected)
        assert_close(linear(library, hidden, packed, pad_bias(bias, library.width)), expected + bias.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_equals_torch_with_each_activation(activation: str, dtype: torch.dtype, library: Library) -> None:
    hidden, weight, bias = draw(65, 70, 9, dtype)
    hidden[0] *= 40  # far into the tails
    packed, padded = pack_weight(weight, library.width), pad_bias(bias, library.width)
    expected = ACTIVATIONS[activation](F.linear(hidden.double(), weight.double(), bias.double()))
    assert_close(linear(library, hidden, packed, padded, activation=activation), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("outputs", [64, 320])  # of both halves; whole panels in all widths
def test_linear_equals_torch_with_gates(outputs: int, activation: str, dtype: torch.dtype, library: Library) -> None:
    for rows in (1, 7, 50, 401):
        hidden, weight, bias = draw(70, outputs, rows, dtype)
        padded = pad_bias(bias, library.width)
        packed = pack_weight(weight, library.width)
        gate, gated = F.linear(hidden.double(), weight.double(), bias.double()).chunk(2, dim=-1)
        found = linear(library, hidden, packed, padded, activation=activation, is_gated=True)
        assert_close(found, ACTIVATIONS[activation](gate) * gated)
        # The sums are those without a gate, also of weights in int8, which give other sums.
        packed = pack_weight(weight, library.width, int8=True)
        gate, gated = linear(library, hidden, packed, padded).double().chunk(2, dim=-1)
        found = linear(library, hidden, packed, padded, activation=activation, is_gated=True)
        assert_close(found, ACTIVATIONS[activation](gate) * gated)


@pytest.mark.parametrize(("panels", "more"), [(1, 0), (3, 0), (2, 1), (1, 4)])
def test_packed_weight_cannot_gate_when_its_halves_are_not_whole_panels(
    panels: int, more: int, library: Library
) -> None:
    hidden, weight, _ = draw(30, panels * 2 * library.width + more, 2, torch.float32)
    packed = pack_weight(weight, library.width)
    assert not packed.can_gate
    with pytest.raises(ValueError, match="not two halves"):
        linear(library, hidden, packed, is_gated=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_kernel_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype, library: Library) -> None:
    for rows in ROWS:
        hidden, weight, bias = draw(*shape, rows, dtype)
        hidden[0] = 0
        packed = pack_weight(weight, library.width, int8=True)
        found = linear(library, hidden, packed, pad_bias(bias, library.width))
        reference = quantized_linear_reference(hidden, *quantize_weight(weight), bias)
        # A number halfway between two of the 65,535 may go to either side.
        tolerance = max(TOLERANCE[dtype], 2e-4)
        torch.testing.assert_close(found, reference, atol=tolerance, rtol=tolerance)
        exact = F.linear(hidden.double(), weight.double(), bias.double())
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_int8_sums_do_not_overflow_at_their_largest(library: Library) -> None:
    """All weights at 127 and all of a row at 32,767: a whole group of such products still fits into 32 bits."""
    for size in (64, 512, 2048 + 30):
        hidden, weight = torch.ones(7, size), torch.ones(40, size)
        for signs in (1.0, -1.0):
            found = linear(library, hidden * signs, pack_weight(weight, library.width, int8=True))
            torch.testing.assert_close(found, torch.full_like(found, signs * size), atol=0, rtol=1e-5)


def test_int8_rows_keep_what_an_outlier_would_drown(library: Library) -> None:
    """Some channels of real models are a thousand times as large as the others."""
    hidden, weight, _ = draw(640, 70, 9, torch.float32)
    hidden[:, 5] = 1000
    weight[:, 5] = 0  # so that all that counts is what the others lose
    found = linear(library, hidden, pack_weight(weight, library.width, int8=True))
    exact = F.linear(hidden.double(), weight.double())
    assert (found.double() - exact).norm() < 0.03 * exact.norm()


def test_int8_weight_keeps_what_a_large_neighbour_in_its_row_would_drown() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 100
    numbers, scale = quantize_weight(weight)
    kept = numbers.float() * scale.repeat_interleave(GROUP, dim=1)
    assert (kept - weight)[:, GROUP:].abs().max() < 0.02


def test_linear_row_does_not_depend_on_other_rows(library: Library) -> None:
    hidden, weight, _ = draw(700, 130, 450, torch.float32)
    for int8 in (False, True):
        packed = pack_weight(weight, library.width, int8=int8)
        together = linear(library, hidden, packed)
        for rows in (1, 5, 8, 200):
            assert torch.equal(linear(library, hidden[:rows], packed), together[:rows])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_linear_gives_the_same_bits_with_any_number_of_threads(
    int8: bool, dtype: torch.dtype, library: Library
) -> None:
    hidden, weight, _ = draw(301, 700, 401, dtype)
    packed = pack_weight(weight, library.width, int8=int8)
    with computing_with(1):
        expected = linear(library, hidden, packed)
    for threads in (2, 5):
        for rows in (1, 7, 401):
            with computing_with(threads):
                found = linear(library, hidden[:rows], packed)
            assert torch.equal(found, expected[:rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(bad: float, library: Library) -> None:
    hidden, weight, _ = draw(65, 70, 9, torch.float32)
    hidden[4, 64] = bad
    for int8 in (False, True):
        found = linear(library, hidden, pack_weight(weight, library.width, int8=int8))
        assert not found[4].isfinite().any()
        assert found[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_packed_weight_gives_back_its_rows(dtype: torch.dtype, library: Library) -> None:
    _, weight, _ = draw(33, 150, 1, dtype)
    indices = torch.tensor([0, 149, 7, 7, 63])
    assert torch.equal(pack_weight(weight, library.width).rows(indices), weight[indices])


def test_linear_accepts_strided_and_stacked_rows(library: Library) -> None:
    hidden, weight, _ = draw(30, 20, 12, torch.float32)
    packed = pack_weight(weight, library.width)
    wide = torch.cat((hidden, hidden), dim=1)
    assert torch.equal(linear(library, wide[:, :30], packed), linear(library, hidden, packed))
    assert torch.equal(linear(library, hidden.view(3, 4, 30), packed), linear(library, hidden, packed).view(3, 4, 20))
    assert linear(library, hidden[:0], packed).shape == (0, 20)


def test_mismatched_shapes_are_refused(library: Library) -> None:
    hidden, weight, _ = draw(30, 20, 12, torch.float32)
    packed = pack_weight(weight, library.width)
    with pytest.raises(ValueError, match="do not go with"):
        linear(library, hidden.bfloat16(), packed)
    with pytest.raises(ValueError, match="do not go with a weight of 30"):
        linear(library, hidden[:, :29], packed)
