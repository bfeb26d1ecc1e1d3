"""Launches of attention's kernels for a shape of heads, on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device import Device
from kernels.kv_write import write_launch
from kernels.launch import Launch
from kernels.paged_decode import DecodePlan, decode_launches, plan_launch
from kernels.paged_layout import LayerCache, Scoring, StepSequences
from kernels.paged_prefill import PrefillPlan, prefill_launch, prefill_plan_launch, prefill_tiles
from kernels.prefix_groups import PrefixGroups, find_launch
from kernels.rms_norm import HeadNorms
from kernels.shared_prefix import attend_shared_launch, prefix_groups

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


@dataclass(frozen=True)
class Heads:
    """A shape of attention."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_dim: int = 128
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        parts = [f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}", f"b{self.block_size}"]
        parts += [f"v{self.value_dim}"] * (self.value_dim != self.head_dim)
        parts += [f"w{self.window}"] * (self.window is not None)
        parts += ["cap"] * (self.soft_cap is not None) + ["sinks"] * self.sinks
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.bfloat16)
        parts += [str(self.kv_dtype).removeprefix("torch.")] * (self.kv_dtype is not self.dtype)
        return "-".join(parts)


LLAMA = Heads()
GPT_OSS = Heads(64, 8, 64, 64, window=128, sinks=True)
SHAPES = (
    LLAMA,
    GPT_OSS,
    Heads(block_size=64, kv_dtype=torch.float8_e4m3fn),
    Heads(8, 4, 256, 256, block_size=32, window=4096, soft_cap=50.0),
    Heads(20, 20, 64, 64),
    Heads(12, 12, 64, 64, block_size=128, dtype=torch.float16, kv_dtype=torch.float16),
    Heads(6, 3, 80, 80, block_size=8),
    Heads(32, 32, 96, 96),
    Heads(16, 16, 192, 128, block_size=64),
    Heads(16, 1, 256, 256, block_size=128),
    Heads(40, 8, 128, 128, block_size=128, window=1024),
    Heads(64, 8, 64, 64, block_size=64, window=128, sinks=True, kv_dtype=torch.float8_e4m3fn),
    Heads(8, 4, 256, 256, soft_cap=50.0, kv_dtype=torch.float8_e4m3fn),
    Heads(dtype=torch.float16, kv_dtype=torch.float8_e4m3fn),
    Heads(8, 2, 64, 64, dtype=torch.float32, kv_dtype=torch.float32),
    Heads(4, 1, 256, 256, dtype=torch.float32, kv_dtype=torch.float32),
)

MODEL_HEADS = {
    "Qwen3-0.6B, blocks of 16": Heads(16, 8),
    "Qwen3-0.6B, blocks of 64": Heads(16, 8, block_size=64),
    "Llama-3.1-8B, blocks of 64": Heads(block_size=64),
    "gpt2-large, blocks of 64": Heads(20, 20, 64, 64, block_size=64),
    "Llama-3.1-8B, blocks of 64, float8": Heads(block_size=64, kv_dtype=torch.float8_e4m3fn),
}


def cache(heads: Heads) -> LayerCache:
    scales = (64, heads.num_kv_heads, heads.block_size)
    return LayerCache(
        empty(64, heads.block_size, heads.num_kv_heads, heads.head_dim, dtype=heads.kv_dtype),
        empty(64, heads.block_size, heads.num_kv_heads, heads.value_dim, dtype=heads.kv_dtype),
        *(empty(*scales, dtype=torch.uint8) for _ in range(2 if heads.kv_dtype is torch.float8_e4m3fn else 0)),
    )


def sequences() -> StepSequences:
    return StepSequences(ints(64, 512), ints(64), ints(65))


def scoring(heads: Heads) -> Scoring:
    return Scoring(0.1, heads.window, heads.soft_cap, empty(heads.num_heads) if heads.sinks else None)


def groups(heads: Heads, device: Device) -> PrefixGroups:
    return prefix_groups(
        256,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        value_dim=heads.value_dim,
        dtype=heads.dtype,
        kv_dtype=heads.kv_dtype,
        device=META,
        target=device,
    )


def decode_plan(heads: Heads, device: Device, *, shares: bool = False) -> DecodePlan:
    return DecodePlan.allocate(
        256,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        value_dim=heads.value_dim,
        kv_dtype=heads.kv_dtype,
        window=heads.window,
        device=META,
        target=device,
        groups=groups(heads, device) if shares else None,
    )


def decode(heads: Heads, device: Device, which: int, *, shares: bool = False, rows: int = 64) -> Launch:
    return decode_launches(
        empty(rows, heads.num_heads, heads.head_dim, dtype=heads.dtype),
        cache(heads),
        StepSequences(ints(rows, 512), ints(rows), ints(rows + 1)),
        decode_plan(heads, device, shares=shares),
        empty(rows, heads.num_heads, heads.value_dim, dtype=heads.dtype),
        scoring(heads),
        target=device,
    )[which]


def plan(heads: Heads, device: Device, *, shares: bool = False) -> Launch:
    return plan_launch(decode_plan(heads, device, shares=shares), ints(64), ints(65))


def find_shared(heads: Heads, device: Device) -> Launch:
    return find_launch(groups(heads, device), sequences(), heads.block_size)


def attend_shared(heads: Heads, device: Device) -> Launch:
    return attend_shared_launch(
        empty(64, heads.num_heads, heads.head_dim, dtype=heads.dtype),
        cache(heads),
        sequences(),
        decode_plan(heads, device, shares=True),
        scoring(heads),
        target=device,
    )


def prefill_plan(heads: Heads, device: Device) -> PrefillPlan:
    group = heads.num_heads // heads.num_kv_heads
    tiles = prefill_tiles(group, heads.head_dim, heads.value_dim, heads.dtype, device)
    return PrefillPlan.allocate(576, block_q=tiles.block_q(group), device=META)


def prefill(heads: Heads, device: Device) -> Launch:
    return prefill_launch(
        empty(512, heads.num_heads, heads.head_dim, dtype=heads.dtype),
        cache(heads),
        sequences(),
        prefill_plan(heads, device),
        empty(512, heads.num_heads, heads.value_dim, dtype=heads.dtype),
        scoring(heads),
        target=device,
    )


def plan_blocks(heads: Heads, device: Device) -> Launch:
    return prefill_plan_launch(prefill_plan(heads, device), ints(65), 512)


def write(heads: Heads, device: Device, turns: bool, interleaved: bool = False, normalizes: bool = False) -> Launch:
    query = empty(64, heads.num_heads, heads.head_dim, dtype=heads.dtype)
    angles = empty(64, 1, heads.head_dim // 2, dtype=heads.dtype)
    weight = empty(heads.head_dim, dtype=heads.dtype)
    return write_launch(
        empty(64, heads.num_kv_heads, heads.head_dim, dtype=heads.dtype),
        empty(64, heads.num_kv_heads, heads.value_dim, dtype=heads.dtype),
        cache(heads),
        empty(64, dtype=torch.int64),
        query=query if turns else None,
        rotated=query if turns else None,
        cos=angles if turns else None,
        sin=angles if turns else None,
        interleaved=interleaved,
        norms=HeadNorms(weight, weight, 1e-6) if normalizes else None,
        target=device,
    )
