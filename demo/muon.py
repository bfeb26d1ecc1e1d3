"""Muon: momentum whose update is orthogonalised, so that no direction of a weight matrix is left behind.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the factor that makes one η fit both Muon and AdamW is
from Liu et al. 2025, arXiv:2502.16982.
"""

# For each matrix, with gradient G, momentum M and learning rate η:
#
#     M ← μ M + (1 − μ) G          U = (1 − μ) G + μ M  (Nesterov)
#     O ≈ (U Uᵀ)^(−½) U            by five Newton-Schulz steps: X ← a X + (b A + c A²) X with A = X Xᵀ
#     W ← (1 − η λ) W − η · 0.2 √max(rows, columns) · O
#
# `torch.optim.Muon` is the same rule, but it iterates in bfloat16, which is slow on a CPU without bfloat16 arithmetic,
# and one matrix at a time.

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_NEWTON_SCHULZ_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """For weight matrices only; everything else belongs in AdamW."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the matrices hold."""
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                updates = orthogonalise(torch.stack([self._momentum(matrix, group) for matrix in matrices]))
                rate = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _momentum(self, matrix: Tensor, group: dict[str, float]) -> Tensor:
        state, gradient, decay = self.state[matrix], matrix.grad, group["momentum"]
        if gradient is None:
            raise ValueError("a matrix has no gradient")
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values come out between 0.7 and 1.2.

    matrices: [n, rows, columns], and so is the result.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


def _by_shape(matrices: list[Tensor]) -> Iterable[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.shape].append(matrix)
    return groups.values()
