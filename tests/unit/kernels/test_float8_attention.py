"""What a float8 cache costs in accuracy, where keys are far larger than e4m3's largest number.

The bound that docs/gpu.md states: with scores that spread by 2 (their standard deviation), attention over keys and
values that were stored as float8 is off by less than 10 % of the outputs' size, beside the same over bfloat16. A number
is off by 2.6 % on average, a score by 2 * 2.6 %, and so are the weights; the values add their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.float8 import LARGEST
from kernels.kv_write import write_kv
from kernels.paged_layout import LayerCache, Scoring
from tests.unit.kernels.paged_steps import PagedStep, make_step
from tests.unit.kernels.references import paged_decode_reference, paged_prefill_reference
from tests.unit.kernels.test_paged_decode import decode
from tests.unit.kernels.test_paged_prefill import prefill

BLOCK, HEADS, DIM = 16, 2, 64
LENGTH = 96
SIZE = 600.0
"""Of a key's numbers, typically: its norm is eight times that."""


def step_of(key: Tensor, value: Tensor, new: int, *, float8: bool) -> PagedStep:
    """One sequence whose keys and values `[LENGTH, HEADS, DIM]` went through the kernel that writes."""
    step = make_step([LENGTH], [new], device=key.device, heads=4, kv_heads=HEADS, head_dim=DIM, dtype=torch.bfloat16)
    if float8:
        scales = (len(step.cache.keys), HEADS, BLOCK)
        cache = LayerCache(
            *(numbers.to(torch.float8_e4m3fn) for numbers in step.cache.tensors),
            *(torch.full(scales, 255, dtype=torch.uint8, device=key.device) for _ in range(2)),
        )
        step = replace(step, cache=cache)
    positions = torch.arange(LENGTH, device=key.device)
    slots = step.sequences.block_tables[0].long()[positions // BLOCK] * BLOCK + positions % BLOCK
    write_kv(key, value, step.cache, slots)
    return replace(step, query=(step.query / SIZE * DIM**0.5 / 4).to(torch.bfloat16))


def off(found: Tensor, exact: Tensor) -> float:
    """As a share of the outputs' size."""
    return float((found - exact).float().norm() / exact.float().norm())


@pytest.mark.parametrize("new", [1, 24], ids=["decode", "prompt"])
def test_float8_attention_of_large_keys_loses_no_more_than_rounding(new: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    key, value = (
        (torch.randn(LENGTH, HEADS, DIM, generator=generator) * size).to(device, torch.bfloat16) for size in (SIZE, 1.0)
    )
    assert float(key.float().norm(dim=-1).min()) > 500
    exact, saturated = (step_of(keys, value, new, float8=False) for keys in (key, key.clamp(-LARGEST, LARGEST)))
    reference = paged_decode_reference if new == 1 else paged_prefill_reference
    outs = []
    for step in (exact, saturated):
        outs.append(step.poisoned_out())
        reference(step.query, step.cache, step.sequences, outs[-1], Scoring(DIM**-0.5))
    stored = step_of(key, value, new, float8=True)
    found = (decode if new == 1 else prefill)(stored, scale=DIM**-0.5)
    assert off(found, outs[0]) < 0.1
    # What one scale of 1 for all would do to them, even before it rounds.
    assert off(outs[1], outs[0]) > 0.25
