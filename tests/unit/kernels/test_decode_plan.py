"""How decodes are cut into items: by what fits a multiprocessor, whatever the sequences' lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from kernels.integers import ceil_div
from kernels.paged_decode import DecodePlan, decode_tiles, plan_decode, programs_at_a_time, programs_per_sm
from tests.unit.kernels.ahead_of_time import DEVICES, read_record
from tests.unit.kernels.attention_variants import MODEL_HEADS, SHAPES, Heads

HOPPER = DEVICES["sm_90"]
QWEN3 = MODEL_HEADS["Qwen3-0.6B, blocks of 64"]
GPT2_LARGE = MODEL_HEADS["gpt2-large, blocks of 64"]
_draw = random.Random(0)
BATCHES = {
    "64 x 1,024": [1024] * 64,
    "256 x 100..2,048": [_draw.randint(100, 2048) for _ in range(256)],
    "8 x 32,768": [32_768] * 8,
    "1,024 x 33": [33] * 1024,
    "1 x 5": [5],
    "1 x 100,000 among 100 x 200": [200] * 50 + [100_000] + [200] * 50,
}


@dataclass(frozen=True)
class Items:
    """A filled plan, on the host."""

    tiles: list[int]
    """Of each item."""

    wanted: int
    bound: int
    """Items that the grid has programs for."""


def planned(heads: Heads, lengths: Sequence[int], device: torch.device) -> Items:
    """The items of a step on Hopper, which cover each tile of each sequence once."""
    plan = DecodePlan.allocate(
        len(lengths),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        value_dim=heads.value_dim,
        kv_dtype=heads.kv_dtype,
        window=None,
        device=device,
        target=HOPPER,
    )
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    plan_decode(plan, torch.tensor(lengths, dtype=torch.int32, device=device), starts)
    count, splits, first = int(plan.num_items), plan.num_splits.tolist(), plan.first_item.tolist()
    of_items = list(zip(plan.item_sequence.tolist(), plan.item_split.tolist(), strict=True))[:count]
    assert of_items == [(sequence, split) for sequence, many in enumerate(splits) for split in range(many)]
    assert first == [sum(splits[:sequence]) for sequence in range(len(lengths))]
    tiles = [ceil_div(length, plan.tile) for length in lengths]
    sizes = [
        tiles[sequence] * (split + 1) // splits[sequence] - tiles[sequence] * split // splits[sequence]
        for sequence, split in of_items
    ]
    assert sum(sizes) == sum(tiles)
    return Items(sizes, plan.target_splits, len(plan.item_sequence))


@pytest.mark.parametrize("title", BATCHES)
@pytest.mark.parametrize("heads", [QWEN3, GPT2_LARGE], ids=lambda heads: heads.name)
def test_items_are_small_and_no_smaller_than_pays(heads: Heads, title: str, device: torch.device) -> None:
    items = planned(heads, BATCHES[title], device)
    tile = decode_tiles(heads.head_dim, heads.value_dim, heads.kv_dtype, HOPPER).tile
    shortest = min(ceil_div(length, tile) for length in BATCHES[title])
    assert len(items.tiles) <= items.bound
    # Halves of five tiles are the smallest that a chunk of four leaves.
    assert min(items.tiles) >= min(2, shortest)
    # A chunk is the work divided by what is wanted, and no item is larger.
    assert max(items.tiles) <= max(4, ceil_div(sum(items.tiles), items.wanted))


@pytest.mark.parametrize(("title", "least", "most"), [("64 x 1,024", 4, 13), ("256 x 100..2,048", 4, 13)])
def test_batches_of_medium_length_are_cut_into_several_waves(
    title: str, least: int, most: int, device: torch.device
) -> None:
    items = planned(QWEN3, BATCHES[title], device)
    at_a_time = HOPPER.num_sms * programs_at_a_time(128, 128, torch.bfloat16, HOPPER)
    assert least <= max(items.tiles) <= most
    assert len(items.tiles) * QWEN3.num_kv_heads >= 4 * at_a_time


def test_multiprocessor_gets_16_to_32_programs_by_what_fits() -> None:
    programs = {
        heads.name: programs_per_sm(heads.head_dim, heads.value_dim, heads.kv_dtype, HOPPER) for heads in SHAPES
    }
    assert set(programs.values()) <= set(range(16, 33))
    assert programs[SHAPES[0].name] == 24
    assert programs[SHAPES[1].name] == 32


@pytest.mark.parametrize("heads", MODEL_HEADS.values(), ids=lambda heads: heads.name)
def test_programs_at_a_time_fit_by_registers_and_shared_memory(heads: Heads) -> None:
    """By the record of what was compiled."""
    name = next(name for name, one in MODEL_HEADS.items() if one is heads)
    found = read_record()["kernels"][f"decode {name}, sm_90"]
    tiles = decode_tiles(heads.head_dim, heads.value_dim, heads.kv_dtype, HOPPER)
    # A warp takes registers by 256; the driver keeps 1 KiB of shared memory for each program.
    by_registers = 65_536 // (ceil_div(found["registers"] * 32, 256) * 256 * tiles.num_warps)
    by_shared_memory = 228 * 1024 // (found["shared"] + 1024)
    claimed = programs_at_a_time(heads.head_dim, heads.value_dim, heads.kv_dtype, HOPPER)
    assert claimed <= min(by_registers, by_shared_memory)
