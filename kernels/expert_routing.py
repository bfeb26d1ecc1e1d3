"""Which experts each token goes to, and the tokens in the experts' order: the first half of a mixture of experts.

    p[t] = softmax(logits[t]);   the k largest p[t, e] are the weights, divided by their sum where they are normalized

(Fedus et al., arXiv 2101.03961; Jiang et al., arXiv 2401.04088.) Token t's choice j is the pair `t * k + j`.
"""

# A grouped product takes pairs in blocks of ROWS that share an expert:
#
#     place        0 .. ROWS-1 | ROWS .. | ...            a block's last places may be empty
#     expert            0      |    0    |    2    | 5 ..      an expert that no token chose has no block
#     pairs        in the order of tokens, so that the same input gives the same arrangement
#
# Two launches, and nothing is read on the host. The first chooses, and counts what each chunk of tokens gives to each
# expert; the second finds from these counts where a chunk's pairs go. How many blocks there are is known on the device
# alone; the bound that grids need, `blocks_bound`, follows from shapes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

# Tokens that a program routes: a chunk.
_TOKENS = 16
# Chunks of tokens whose counts are added up at a time.
_CHUNKS = 16
# Blocks that a program of the second kernel describes.
_BLOCKS = 16


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits,
    weights,
    experts,
    counts,
    num_tokens,
    stride,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
):
    chunk = tl.program_id(0)
    token = (chunk * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < num_tokens
    expert = tl.arange(0, BLOCK)
    is_expert = (expert < EXPERTS)[None, :]
    choice = tl.arange(0, CHOICES)
    x = tl.load(logits + token[:, None] * stride + expert[None, :], mask=inside[:, None] & is_expert, other=0.0).to(
        tl.float32
    )
    power = tl.where(is_expert, tl.exp(x - tl.max(tl.where(is_expert, x, float("-inf")), 1)[:, None]), 0.0)
    # An order in which everything has its place, NaN too: no expert may be chosen twice, or one that does not exist.
    order = tl.where(x == x, tl.minimum(tl.maximum(x, -3.0e38), 3.0e38), -3.0e38)
    order = tl.where(is_expert, order, float("-inf"))
    chosen = tl.full([TOKENS, CHOICES], 0, tl.int32)
    weight = tl.full([TOKENS, CHOICES], 0.0, tl.float32)
    taken = tl.full([TOKENS, BLOCK], 0, tl.int32)
    for place in range(PER_TOKEN):
        best = tl.argmax(order, 1)
        is_best = expert[None, :] == best[:, None]
        order = tl.where(is_best, float("-inf"), order)
        taken = tl.where(is_best, 1, taken)
        is_place = (choice == place)[None, :]
        chosen = tl.where(is_place, best[:, None], chosen)
        weight = tl.where(is_place, tl.sum(tl.where(is_best, power, 0.0), 1)[:, None], weight)
    total = tl.sum(power, 1)
    if NORMALIZED:
        # A NaN that was not chosen is to be seen all the same.
        total = tl.where(total == total, tl.sum(weight, 1), total)
    pair = token[:, None] * PER_TOKEN + choice[None, :]
    is_pair = inside[:, None] & (choice < PER_TOKEN)[None, :]
    tl.store(weights + pair, weight / total[:, None], mask=is_pair)
    tl.store(experts + pair, chosen, mask=is_pair)
    given = tl.sum(tl.where(inside[:, None], taken, 0), 0)
    tl.store(counts + chunk * EXPERTS + expert, given, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_blocks"])
def _arrange_kernel(
    experts,
    counts,
    pairs,
    block_expert,
    block_rows,
    num_tokens,
    num_chunks,
    num_blocks,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    is_expert = expert < EXPERTS
    total = tl.full([BLOCK], 0, tl.int32)
    before = tl.full([BLOCK], 0, tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        other = first + tl.arange(0, CHUNKS)
        count = tl.load(
            counts + other[:, None] * EXPERTS + expert[None, :],
            mask=(other < num_chunks)[:, None] & is_expert[None, :],
            other=0,
        )
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], count, 0), 0)
    blocks = (total + ROWS - 1) // ROWS
    end = tl.cumsum(blocks, 0)
    begin = end - blocks

    token = chunk * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    taken = tl.full([TOKENS, BLOCK], 0, tl.int32)
    for choice in range(PER_TOKEN):
        chosen = tl.load(experts + token * PER_TOKEN + choice, mask=inside, other=BLOCK)
        taken += (chosen[:, None] == expert[None, :]).to(tl.int32)
    place = (begin * ROWS + before)[None, :] + tl.cumsum(taken, 0) - taken
    for choice in range(PER_TOKEN):
        pair = token * PER_TOKEN + choice
        chosen = tl.load(experts + pair, mask=inside, other=BLOCK)
        here = tl.sum(tl.where(chosen[:, None] == expert[None, :], place, 0), 1)
        tl.store(pairs + here, pair, mask=inside)

    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    is_whose = (begin[None, :] <= block[:, None]) & (block[:, None] < end[None, :])
    left = total[None, :] - (block[:, None] - begin[None, :]) * ROWS
    rows = tl.sum(tl.where(is_whose, tl.minimum(left, ROWS), 0), 1)
    tl.store(block_expert + block, tl.sum(tl.where(is_whose, expert[None, :], 0), 1), mask=block < num_blocks)
    tl.store(block_rows + block, rows, mask=block < num_blocks)


@dataclass(frozen=True, slots=True)
class Routing:
    """Where T tokens go, k experts each; on the device."""

    weights: Tensor
    """`[T, k]` float32."""

    experts: Tensor
    """`[T, k]` int32: each token's, from the most likely on; all different."""

    pairs: Tensor
    """`[blocks * rows]` int32: which pair stands at a place; anything where a block is not full."""

    block_expert: Tensor
    """`[blocks]` int32."""

    block_rows: Tensor
    """`[blocks]` int32: how many of its places a block has filled, from the first; 0 for a block that is none."""

    rows: int
    """Places in a block."""


def blocks_bound(num_pairs: int, num_experts: int, rows: int) -> int:
    """Most blocks that pairs can fill: every expert that has any may have one that is not full."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // rows


def num_chunks(num_tokens: int) -> int:
    """Chunks in which tokens are routed."""
    return ceil_div(num_tokens, _TOKENS)


def route(logits: Tensor, per_token: int, *, normalized: bool, rows: int) -> Routing:
    """Choose `per_token` experts by logits `[T, experts]`, and arrange them in blocks of `rows`.

    A row with NaN goes to experts, too, with weights that are NaN.
    """
    num_tokens, num_experts = logits.shape
    bound = blocks_bound(num_tokens * per_token, num_experts, rows)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    routing = Routing(
        weights=torch.empty(num_tokens, per_token, dtype=torch.float32, device=logits.device),
        experts=ints(num_tokens, per_token),
        pairs=ints(bound * rows),
        block_expert=ints(bound),
        block_rows=ints(bound),
        rows=rows,
    )
    counts = ints(num_chunks(num_tokens), num_experts)
    for launch in route_launches(logits, routing, counts, normalized=normalized):
        launch.run()
    return routing


def route_launches(
    logits: Tensor, routing: Routing, counts: Tensor, *, normalized: bool, target: Device | None = None
) -> tuple[Launch, Launch]:
    """What `route` runs; `counts` is room for the choices of each chunk of tokens, `[chunks, experts]` int32."""
    target = target or device_of(logits.device)
    num_tokens, num_experts = logits.shape
    per_token = routing.experts.shape[1]
    num_blocks = len(routing.block_rows)
    block = triton.next_power_of_2(num_experts)
    # About 16 numbers a thread.
    num_warps = min(8, max(1, _TOKENS * block // (16 * target.warp_size)))
    return (
        Launch(
            _choose_kernel,
            (len(counts),),
            {
                "logits": logits,
                "weights": routing.weights,
                "experts": routing.experts,
                "counts": counts,
                "num_tokens": num_tokens,
                "stride": logits.stride(0),
            },
            {
                "EXPERTS": num_experts,
                "PER_TOKEN": per_token,
                "NORMALIZED": normalized,
                "TOKENS": _TOKENS,
                "BLOCK": block,
                "CHOICES": triton.next_power_of_2(per_token),
            },
            num_warps=num_warps,
        ),
        Launch(
            _arrange_kernel,
            (max(len(counts), ceil_div(num_blocks, _BLOCKS)),),
            {
                "experts": routing.experts,
                "counts": counts,
                "pairs": routing.pairs,
                "block_expert": routing.block_expert,
                "block_rows": routing.block_rows,
                "num_tokens": num_tokens,
                "num_chunks": len(counts),
                "num_blocks": num_blocks,
            },
            {
                "EXPERTS": num_experts,
                "PER_TOKEN": per_token,
                "ROWS": routing.rows,
                "TOKENS": _TOKENS,
                "CHUNKS": _CHUNKS,
                "BLOCKS": _BLOCKS,
                "BLOCK": block,
            },
            num_warps=num_warps,
        ),
    )
