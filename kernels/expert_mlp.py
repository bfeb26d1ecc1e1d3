"""The MLPs of a mixture of experts, each on the tokens that were routed to it, and the sum of what they give.

    h[t, j]   = act( gate_e x[t] ) * ( up_e x[t] )          e = experts[t, j]
    out[t]    = sum_j weights[t, j] * ( down_e h[t, j] )

T tokens, k experts for each, E in all; x `[T, D]`, gate over up `[E, 2 I, D]`, down `[E, D, I]`.
"""

# Grouped products as in MegaBlocks (Gale et al., arXiv 2211.15841): a block of rows shares an expert
# (`expert_routing.py`), its program reads the rows where they lie and leaves the results at their pair, so that nothing
# is sorted or padded in memory. Gate and up are multiplied side by side: their halves never pass through memory. Sums
# of products are float32 and rounded once; the sum over experts is taken in the order of the token's choices, by a
# launch of its own, since adding in place would give other bits each time.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.expert_routing import Routing, route
from kernels.gated_activation import ACTIVATIONS, FUNCTIONS, activate
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

# Blocks of rows whose programs run beside each other for the same columns, so that they find weights in the cache.
_GROUP = 8
# Numbers of a row that a program of the sum takes.
_WIDTH = 1024


@triton.jit(do_not_specialize=["num_blocks"])
def _product_kernel(
    x,
    weight,
    pairs,
    block_expert,
    block_rows,
    out,
    num_blocks,
    stride,
    PAIRS_PER_ROW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    IS_GATED: tl.constexpr = ACTIVATION != ""
    PARTS: tl.constexpr = 1 + IS_GATED
    TILES: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first = program // (GROUP * TILES) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    block = first + program % (GROUP * TILES) % size
    rows = tl.load(block_rows + block)
    if rows == 0:
        return
    expert = tl.load(block_expert + block).to(tl.int64)
    lane = tl.arange(0, ROWS)
    is_row = lane < rows
    pair = tl.load(pairs + block * ROWS + lane, mask=is_row, other=0).to(tl.int64)
    column = program % (GROUP * TILES) // size * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < OUT)[None, :]
    depth = tl.arange(0, DEPTH)

    x_rows = x + (pair // PAIRS_PER_ROW)[:, None] * stride
    w_columns = weight + expert * (PARTS * OUT * IN) + column[None, :] * IN
    acc = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    up = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, IN, DEPTH):
        k = start + depth
        if IN % DEPTH == 0:
            a = tl.load(x_rows + k[None, :], mask=is_row[:, None], other=0.0)
            is_weight = is_column
        else:
            a = tl.load(x_rows + k[None, :], mask=is_row[:, None] & (k < IN)[None, :], other=0.0)
            is_weight = is_column & (k < IN)[:, None]
        b = tl.load(w_columns + k[:, None], mask=is_weight, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if IS_GATED:
            b = tl.load(w_columns + OUT * IN + k[:, None], mask=is_weight, other=0.0)
            if UPCAST:
                b = b.to(tl.float32)
            up = tl.dot(a, b, up, input_precision="ieee")
    if IS_GATED:
        acc = activate(acc, ACTIVATION) * up
    tl.store(out + pair[:, None] * OUT + column[None, :], acc, mask=is_row[:, None] & is_column)


@triton.jit
def _sum_kernel(x, weights, out, PER_TOKEN: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < SIZE
    total = tl.full([WIDTH], 0.0, tl.float32)
    for choice in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + choice
        row = tl.load(x + pair * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * row
    tl.store(out + token * SIZE + column, total, mask=inside)


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """How a grouped product is cut; from the hand table `product_tiles`."""

    rows: int
    """Of a block, which is the routing's too."""

    columns: int
    """Outputs of a program; of gate and up half as many each."""

    depth: int
    num_warps: int
    num_stages: int


def product_tiles(num_pairs: int, num_experts: int, dtype: torch.dtype, device: Device) -> ProductTiles:
    """The table. Not yet tuned on a GPU: chosen by shared memory and registers.

    A block has about as many rows as an expert gets, so that each expert's weights are read once where there are few.
    """
    if device.is_interpreter:
        return ProductTiles(rows=16, columns=128, depth=64, num_warps=4, num_stages=2)
    rows = min(128, max(16, triton.next_power_of_2(ceil_div(num_pairs, num_experts))))
    if dtype is torch.float32:
        # No matrix unit multiplies it exactly: small tiles, for the registers' sake.
        return ProductTiles(rows=min(32, rows), columns=64, depth=32, num_warps=4, num_stages=2)
    if device.backend == "hip":
        return ProductTiles(rows=rows, columns=128, depth=64, num_warps=4 if rows <= 32 else 8, num_stages=1)
    stages = 2 if device.shared_memory < 128 * 1024 else 3 if rows >= 64 else 4
    return ProductTiles(rows=rows, columns=128, depth=64, num_warps=4 if rows <= 64 else 8, num_stages=stages)


def expert_mlp(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    per_token: int,
    *,
    normalized: bool,
    activation: str = "silu",
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """Send each row of `x` `[T, D]` through `per_token` of the experts, by the router's logits `[T, E]`.

    `gate_up` is `[E, 2 I, D]`, `down` `[E, D, I]`; `normalized` divides the weights by their sum; `activation` is one
    of `gated_activation.FUNCTIONS`. With kernels always five launches, independent of the routing; without, `product`
    multiplies rows with an expert's weight.
    """
    if not dispatch.use_triton(x) or activation not in ACTIVATIONS:
        return expert_mlp_fallback(
            x, logits, gate_up, down, per_token, normalized=normalized, activation=activation, product=product
        )
    num_experts, hidden, inner = down.shape
    num_pairs = len(x) * per_token
    tiles = product_tiles(num_pairs, num_experts, x.dtype, device_of(x.device))
    routing = route(logits, per_token, normalized=normalized, rows=tiles.rows)

    def empty(rows: int, size: int) -> Tensor:
        return torch.empty(rows, size, dtype=x.dtype, device=x.device)

    middle, results, out = empty(num_pairs, inner), empty(num_pairs, hidden), empty(len(x), hidden)
    product_launch(x, gate_up, routing, middle, tiles, activation=activation).run()
    product_launch(middle, down, routing, results, tiles, activation=None).run()
    sum_launch(results, routing.weights, out).run()
    return out


def expert_mlp_fallback(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    per_token: int,
    *,
    normalized: bool,
    activation: str = "silu",
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """As `expert_mlp`, expert by expert.

    Rows are sorted by expert, so that each expert's weights are used once for all of its tokens, and summed per token
    in the router's order: a token's result does not depend on which others are in the batch.
    """
    weights, experts = logits.float().softmax(dim=-1).topk(per_token, dim=-1)
    if normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=len(gate_up)).tolist()
    rows = x.index_select(0, order // per_token)
    results = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            gates, up = product(rows[start:end], gate_up[expert]).chunk(2, dim=-1)
            results[start:end] = product(FUNCTIONS[activation](gates) * up, down[expert])
            start = end
    by_token = torch.empty_like(results).index_copy_(0, order, results).view(len(x), per_token, x.shape[1])
    return (by_token * weights[:, :, None]).sum(1).to(x.dtype)


def product_launch(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor,
    tiles: ProductTiles,
    *,
    activation: str | None,
    target: Device | None = None,
) -> Launch:
    """One grouped product: `x` has a row for each token or one for each pair, `out` one for each pair.

    With an activation `weight` is `[E, 2 N, K]`, gates before the others, else `[E, N, K]`; contiguous. `out` is
    `[pairs, N]`, contiguous.
    """
    target = target or device_of(x.device)
    if routing.rows != tiles.rows:
        raise ValueError(f"tokens were routed to blocks of {routing.rows}, not {tiles.rows}")
    num_blocks = len(routing.block_rows)
    size = out.shape[1]
    columns = tiles.columns // 2 if activation else tiles.columns
    return Launch(
        _product_kernel,
        (num_blocks * ceil_div(size, columns),),
        {
            "x": x,
            "weight": weight,
            "pairs": routing.pairs,
            "block_expert": routing.block_expert,
            "block_rows": routing.block_rows,
            "out": out,
            "num_blocks": num_blocks,
            "stride": x.stride(0),
        },
        {
            "PAIRS_PER_ROW": 1 if len(x) == len(out) else routing.experts.shape[1],
            "IN": x.shape[1],
            "OUT": size,
            "ACTIVATION": activation or "",
            "UPCAST": target.is_interpreter,
            "ROWS": tiles.rows,
            "COLUMNS": columns,
            "DEPTH": tiles.depth,
            "GROUP": _GROUP,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def sum_launch(results: Tensor, weights: Tensor, out: Tensor) -> Launch:
    """Each token's `[k, D]` results, weighted and added up."""
    num_tokens, per_token = weights.shape
    size = out.shape[1]
    return Launch(
        _sum_kernel,
        (num_tokens, ceil_div(size, _WIDTH)),
        {"x": results, "weights": weights, "out": out},
        {"PER_TOKEN": per_token, "SIZE": size, "WIDTH": min(_WIDTH, triton.next_power_of_2(size))},
    )
