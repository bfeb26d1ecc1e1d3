"""Log-probabilities of given tokens, and of the most likely ones, without a softmax over the vocabulary.

    log p[t] = x[t] - log sum_v exp(x[v])

One pass over each row gives its log-sum-exp, with a running maximum (arXiv 1805.02867). The most likely tokens are
chosen among the logits, whose order is that of the probabilities, so that only what is wanted is ever subtracted from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

_BLOCK = 4096


@triton.jit
def _logsumexp_kernel(logits, tokens, out, chosen, vocab_size, stride, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - finite) + tl.exp(x - finite)
        highest = higher
    most = tl.max(highest)
    logsumexp = most + tl.log(tl.sum(total * tl.exp(highest - most)))
    tl.store(out + number, logsumexp)
    token = tl.load(tokens + number)
    tl.store(chosen + number, tl.load(row + token).to(tl.float32) - logsumexp)


def log_probs(logits: Tensor, tokens: Tensor, num_top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, float32, of `tokens` `[rows]`; those of the `num_top` most likely; and these tokens, int64.

    Logits are `[rows, vocab_size]`, float, contiguous in the last dimension, each row with a finite maximum.
    """
    if not dispatch.use_triton(logits):
        every = logits.float().log_softmax(dim=-1)
        values, ids = every.topk(num_top, dim=-1)
        return every.gather(-1, tokens[:, None]).squeeze(-1), values, ids
    logsumexp, chosen = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    log_probs_launch(logits, tokens, logsumexp, chosen).run()
    values, ids = logits.topk(num_top, dim=-1)
    return chosen, values.float() - logsumexp[:, None], ids


def log_probs_launch(logits: Tensor, tokens: Tensor, logsumexp: Tensor, chosen: Tensor) -> Launch:
    return Launch(
        _logsumexp_kernel,
        (len(logits),),
        {
            "logits": logits,
            "tokens": tokens,
            "out": logsumexp,
            "chosen": chosen,
            "vocab_size": logits.shape[1],
            "stride": logits.stride(0),
        },
        {"BLOCK": _BLOCK},
        num_warps=8,
    )
