"""The middle of a gated MLP (Shazeer, arXiv 2002.05202): from the two halves of one projection to their product.

out[t, i] = act(x[t, i]) * x[t, I + i]                  x is [T, 2 I]; float32, rounded once

silu       g / (1 + exp(-g))
gelu       g (1 + erf(g / sqrt 2)) / 2
gelu_tanh  g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2
"""

# One pass instead of two, and no intermediate of size `[T, I]`.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The same in torch, and one that kernels lack."""

_BLOCK = 1024


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """One of `ACTIVATIONS` of float32 numbers."""
    if ACTIVATION == "silu":
        # Clamped where the quotient is nothing already: nothing overflows.
        gate = gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0)))
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(tl.minimum(-2.0 * z, 80.0)))
    return gate


@triton.jit
def _gated_activation_kernel(x, out, size, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, activate(gate, ACTIVATION) * up, mask=inside)


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """`[T, 2 I]` (contiguous in its last dimension) to `[T, I]`, by one of `FUNCTIONS`."""
    if not dispatch.use_triton(x) or activation not in ACTIVATIONS:
        gate, up = x.chunk(2, dim=-1)
        return FUNCTIONS[activation](gate) * up
    out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
    gated_activation_launch(x, out, activation).run()
    return out


def gated_activation_launch(x: Tensor, out: Tensor, activation: str) -> Launch:
    size = out.shape[1]
    return Launch(
        _gated_activation_kernel,
        (len(x), ceil_div(size, _BLOCK)),
        {"x": x, "out": out, "size": size, "stride": x.stride(0)},
        {"ACTIVATION": activation, "BLOCK": _BLOCK},
    )
