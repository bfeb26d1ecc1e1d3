"""Reference implementations: the formulas as they stand, in float32 or float64, however slow."""

from __future__ import annotations

import torch
from torch import Tensor

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
