"""The product with quantized weights against its reference, and the packed form against the numbers that went in."""

from __future__ import annotations

import pytest
import torch

from kernels.device import interprets
from kernels.quantized_matmul import (
    KINDS,
    QuantizedWeight,
    joined,
    quantized_matmul,
    quantized_matmul_launch,
    quantized_matmul_reference,
    quantized_weight,
)

# Rows, outputs, inputs, group size, type: none a multiple of a block, groups that end early, one group, many rows.
CASES = [
    (1, 7, 40, 40, torch.float32),
    (1, 7, 40, 40, torch.bfloat16),
    (3, 33, 104, 32, torch.float16),
    (17, 65, 200, 48, torch.float32),
    (5, 16, 320, 128, torch.bfloat16),
    (70, 130, 64, 16, torch.float16),
]


def parts(outputs: int, inputs: int, group_size: int, kind: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Numbers, scales, zeros and an order."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group_size)
    if kind == "e4m3":
        numbers = torch.randn(outputs, inputs, generator=draw).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        numbers = torch.randint(16 if kind == "int4" else 256, (outputs, inputs), generator=draw, dtype=torch.uint8)
    scales = torch.rand(groups, outputs, generator=draw) + 0.1
    largest = 17 if kind == "int4" else 257
    zeros = torch.randint(largest, (groups, outputs), generator=draw, dtype=torch.int16)
    return numbers, scales, zeros, torch.randperm(inputs, generator=draw).int()


def weight_of(
    device: torch.device, outputs: int, inputs: int, group_size: int, kind: str, *, ordered: bool = False
) -> QuantizedWeight:
    numbers, scales, zeros, order = (part.to(device) for part in parts(outputs, inputs, group_size, kind))
    return quantized_weight(
        numbers,
        scales.half() / (16 if kind == "int4" else 256),
        None if kind == "e4m3" else zeros,
        order if ordered else None,
        kind=kind,
        group_size=group_size,
    )


def randn(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(device)


def truncated(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in float32 that bfloat16 holds, as Triton's interpreter makes them: cut off instead of rounded."""
    return (numbers.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


def expected_product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype is not torch.bfloat16 or not interprets():
        return quantized_matmul_reference(x, weight, bias)
    product = x.float() @ truncated(weight.dequantized(torch.float32)).t()
    return truncated(product if bias is None else product + bias.float()).bfloat16()


def assert_is_product(
    found: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> None:
    """Sums of float32 in another order, each rounded once, differ by no more than the sizes of their terms allow."""
    expected = expected_product(x, weight, bias)
    assert found.dtype == expected.dtype
    sizes = x.float().abs() @ weight.dequantized(x.dtype).float().abs().t()
    if bias is not None:
        sizes += bias.float().abs()
    kind = torch.finfo(x.dtype)
    rounding = kind.eps * expected.float().abs().clamp(min=kind.tiny)
    bound = 4 * torch.finfo(torch.float32).eps * sizes + rounding
    excess = (found.float() - expected.float()).abs() - bound
    assert excess.max() <= 0  # False for NaN, too


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_matmul_equals_the_dequantized_product(
    kind: str, case: tuple[int, int, int, int, torch.dtype], device: torch.device
) -> None:
    rows, outputs, inputs, group_size, dtype = case
    # Rows that are part of wider ones, whose neighbours would be seen in a sum.
    wide = randn(rows, inputs + 5, device=device, dtype=dtype)
    wide[:, inputs:] = torch.nan
    x, bias = wide[:, :inputs], randn(outputs, device=device, dtype=dtype)
    for ordered, its_bias in ((False, bias), (True, None)):
        weight = weight_of(device, outputs, inputs, group_size, kind, ordered=ordered)
        poisoned = torch.full((rows + 1, outputs), torch.nan, dtype=dtype, device=device)
        quantized_matmul_launch(x, weight, its_bias, poisoned[:rows]).run()
        assert_is_product(poisoned[:rows], x, weight, its_bias)
        assert poisoned[rows:].isnan().all()


def test_quantized_matmul_output_has_the_type_of_its_input(device: torch.device) -> None:
    weight = weight_of(device, 9, 32, 32, "int4")
    x = randn(2, 32, device=device, dtype=torch.float16)
    assert_is_product(quantized_matmul(x, weight), x, weight)
    assert quantized_matmul(x[:0], weight).shape == (0, 9)


@pytest.mark.parametrize("group_size", [16, 48, 64, 104])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weight_follows_the_formula(kind: str, group_size: int, device: torch.device) -> None:
    numbers, scales, zeros, order = parts(5, 104, group_size, kind)
    weight = quantized_weight(
        *(part.to(device) for part in (numbers, scales)),
        None if kind == "e4m3" else zeros.to(device),
        order.to(device),
        kind=kind,
        group_size=group_size,
    )
    found = weight.dequantized(torch.float32)
    for output in range(5):
        for column in range(104):
            group = column // group_size
            number = numbers[output, column]
            if kind == "e4m3":
                exact = float(number.view(torch.float8_e4m3fn)) * float(scales[group, output])
            else:
                exact = (int(number) - int(zeros[group, output])) * float(scales[group, output])
            assert float(found[output, order[column]]) == pytest.approx(exact, rel=1e-6)


def test_weights_are_joined_by_outputs(device: torch.device) -> None:
    several = [weight_of(device, outputs, 64, 32, "int4", ordered=True) for outputs in (3, 8)]
    # Orders are drawn after what depends on the number of outputs.
    assert joined(several) is None
    several = [weight_of(device, outputs, 64, 32, "int4") for outputs in (3, 8)]
    together = joined(several)
    assert together is not None
    separate = torch.cat([weight.dequantized(torch.float32) for weight in several])
    assert torch.equal(together.dequantized(torch.float32), separate)
    assert joined([several[0], weight_of(device, 3, 64, 16, "int4")]) is None
    assert joined([several[0], weight_of(device, 3, 64, 32, "int8")]) is None


def test_quantized_weight_refuses_groups_that_no_tile_divides() -> None:
    numbers, scales, zeros, _ = parts(5, 48, 24, "int4")
    with pytest.raises(ValueError, match="groups of 24 inputs"):
        quantized_weight(numbers, scales, zeros, kind="int4", group_size=24)
