"""Reference implementations: the formulas as they stand, in float32 or float64, however slow."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_routing import Routing, blocks_bound
from kernels.float8 import dequantize_reference
from kernels.kv_write import write_kv_reference
from kernels.paged_attention import paged_attention_reference, plan_tiles
from kernels.paged_layout import LayerCache, Scoring, StepSequences
from kernels.rms_norm import HeadNorms
from kernels.sampling_fallback import NONE_ALLOWED, NOT_FINITE


def log_probs_reference(logits: Tensor, tokens: Tensor, num_top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.log_probs.log_probs`."""
    everything = logits.float().log_softmax(-1)
    values, ids = everything.topk(num_top, dim=-1)
    return everything.gather(1, tokens[:, None])[:, 0], values, ids


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> Tensor:
    """`kernels.sampling.sample`, with sorts and in double precision; `draws` `[rows]` are the random numbers."""
    best, tokens = logits.max(dim=-1)
    tokens = logits.argmax(dim=-1)
    x = logits.double() / torch.where(temperature == 0, 1.0, temperature).double()[:, None]
    ordered = x.sort(dim=-1, descending=True).values
    least = ordered.gather(1, (top_k.long() - 1)[:, None])
    kept = x >= least
    ordered = ordered.masked_fill(ordered < least, float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    last = ((before < top_p.double()[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
    kept &= (top_p.double()[:, None] >= 1) | (x >= ordered.gather(1, last))
    kept &= x >= x.amax(-1, keepdim=True) + min_p.double().log()[:, None]
    passed = x.masked_fill(~kept, float("-inf")).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(passed, draws.double()[:, None] * passed[:, -1:], right=True)[:, 0]
    tokens = torch.where(temperature == 0, tokens, drawn.clamp(max=logits.shape[1] - 1))
    tokens = torch.where(best == float("-inf"), NONE_ALLOWED, tokens)
    return torch.where(best.isnan() | (best == float("inf")), NOT_FINITE, tokens)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """`rms_norm`."""
    h = x.float()
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * scale * (weight.float() + offset)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`."""
    total = x + residual
    return rms_norm_reference(total, weight, eps, offset=offset), total


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm`."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm`."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def gated_activation_reference(x: Tensor, activation: str) -> Tensor:
    """`gated_activation`."""
    gate, up = x.float().chunk(2, dim=-1)
    acted = (
        F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh" if "tanh" in activation else "none")
    )
    return (acted * up).to(x.dtype)


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """`rotate`."""
    cos, sin = (angles.view(len(heads), 1, -1).float() for angles in (cos, sin))
    half = cos.shape[-1]
    turning, rest = heads[..., : 2 * half].float(), heads[..., 2 * half :]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


def rotate_and_write_kv_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
    *,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> Tensor:
    """`rotate_and_write_kv`."""
    if norms is not None:
        query = rms_norm_reference(query, norms.query, norms.eps, offset=norms.offset)
        key = rms_norm_reference(key, norms.key, norms.eps, offset=norms.offset)
    key = rotate_reference(key, cos, sin, interleaved=interleaved)
    write_kv_reference(key, value, cache, slots)
    return rotate_reference(query, cos, sin, interleaved=interleaved)


def paged_decode_reference(
    query: Tensor, cache: LayerCache, sequences: StepSequences, out: Tensor, scoring: Scoring
) -> None:
    """`paged_decode`, which reads lengths on the CPU."""
    starts = sequences.query_starts.tolist()
    lengths = sequences.seq_lens.tolist()
    decodes = [s for s, length in enumerate(lengths) if starts[s + 1] - starts[s] == 1 and length > 0]
    padding = [starts[s] for s, length in enumerate(lengths) if starts[s + 1] - starts[s] == 1 and length == 0]
    out[padding] = 0.0
    if not decodes:
        return
    rows = [starts[s] for s in decodes]
    tiles = plan_tiles(
        [lengths[s] - 1 for s in decodes],
        [1] * len(decodes),
        sequences.block_tables[decodes].long().cpu().numpy(),
        cache.block_size,
        sliding_window=scoring.window,
        device=query.device,
        dtype=query.dtype,
    )
    out[rows] = paged_attention_reference(query[rows], dequantized(cache, query.dtype), tiles, scoring)


def dequantized(cache: LayerCache, dtype: torch.dtype) -> LayerCache:
    """A cache as numbers of `dtype`."""
    if cache.key_scales is None or cache.value_scales is None:
        return cache
    return LayerCache(
        dequantize_reference(cache.keys, cache.key_scales).to(dtype),
        dequantize_reference(cache.values, cache.value_scales).to(dtype),
    )


def paged_prefill_reference(
    query: Tensor, cache: LayerCache, sequences: StepSequences, out: Tensor, scoring: Scoring
) -> None:
    """`paged_prefill`, which reads lengths on the CPU."""
    starts, lengths = sequences.query_starts.tolist(), sequences.seq_lens.tolist()
    news = [end - start for start, end in pairwise(starts)]
    chosen = [sequence for sequence, new in enumerate(news) if new > 1]
    if not chosen:
        return
    rows = [row for sequence in chosen for row in range(starts[sequence], starts[sequence + 1])]
    tiles = plan_tiles(
        [lengths[sequence] - news[sequence] for sequence in chosen],
        [news[sequence] for sequence in chosen],
        sequences.block_tables[chosen].long().cpu().numpy(),
        cache.block_size,
        sliding_window=scoring.window,
        device=query.device,
        dtype=query.dtype,
    )
    out[rows] = paged_attention_reference(query[rows], dequantized(cache, query.dtype), tiles, scoring)


def expert_mlp_reference(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    per_token: int,
    *,
    normalized: bool,
    activation: str = "silu",
) -> Tensor:
    """Send each row of `x` `[T, D]` through `per_token` of the experts, by logits `[T, E]`.

    `gate_up` is `[E, 2 I, D]`, `down` `[E, D, I]`; `normalized` divides the weights by their sum.
    """
    routing = route_reference(logits, per_token, normalized=normalized, rows=1)
    results = torch.empty(len(x) * per_token, x.shape[1], dtype=x.dtype, device=x.device)
    for pair, expert in enumerate(routing.experts.flatten().tolist()):
        token = x[pair // per_token : pair // per_token + 1].float()
        middle = gated_activation_reference(F.linear(token, gate_up[expert].float()), activation).to(x.dtype)
        results[pair] = F.linear(middle.float(), down[expert].float())[0]
    weighted = results.float().view(*routing.weights.shape, x.shape[1]) * routing.weights[:, :, None]
    return weighted.sum(1).to(x.dtype)


def route_reference(logits: Tensor, per_token: int, *, normalized: bool, rows: int) -> Routing:
    """`route`; it reads counts on the host."""
    num_tokens, num_experts = logits.shape
    weights, experts = logits.float().softmax(dim=-1).topk(per_token, dim=-1)
    if normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    bound = blocks_bound(num_tokens * per_token, num_experts, rows)
    pairs = torch.zeros(bound * rows, dtype=torch.int32, device=logits.device)
    block_expert, block_rows = torch.zeros(2, bound, dtype=torch.int32, device=logits.device)
    block = 0
    for expert in range(num_experts):
        mine = (experts.flatten() == expert).nonzero()[:, 0].to(torch.int32)
        for first in range(0, len(mine), rows):
            some = mine[first : first + rows]
            pairs[block * rows : block * rows + len(some)] = some
            block_expert[block], block_rows[block] = expert, len(some)
            block += 1
    return Routing(weights, experts.to(torch.int32), pairs, block_expert, block_rows, rows)
