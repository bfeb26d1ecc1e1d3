"""Mixtures of experts: each token goes through the few MLPs that a router picks for it.

    p = softmax(router(x));   out = sum over the k largest p_e of  p_e * expert_e(x)

On a GPU that is five launches (`kernels/expert_mlp.py`), and the host does not learn what goes where. Elsewhere rows
are sorted by expert, so that each expert's weights are used once for all of its tokens, and summed per token in the
router's order: a token's result does not depend on which others are in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.decoder import Weights
from engine.models.layers import activation, gate
from kernels.device import has_kernels
from kernels.expert_mlp import expert_mlp


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture, below the layer's name."""

    block: str
    gate: str
    up: str
    down: str


class SparseMLP(nn.Module):
    """From a transformers configuration with `num_experts` and `num_experts_per_tok`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        self.per_token: int = config.num_experts_per_tok
        """Experts that a token goes through."""

        self._normalized = getattr(config, "norm_topk_prob", True)
        self._act = activation(config.hidden_act)
        self._gate = gate(config.hidden_act)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        """How rows are multiplied with an expert's weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        if self._gate is not None and has_kernels(hidden):
            return expert_mlp(
                hidden,
                self.router(hidden),
                self.gate_up,
                self.down,
                self.per_token,
                normalized=self._normalized,
                activation=self._gate,
            )
        weights, experts = self._route(hidden)
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=len(self.gate_up)).tolist()
        rows = hidden.index_select(0, order // self.per_token)
        results = torch.empty_like(rows)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                end = start + count
                gates, up = self.product(rows[start:end], self.gate_up[expert]).chunk(2, dim=-1)
                results[start:end] = self.product(self._act(gates) * up, self.down[expert])
                start = end
        by_token = torch.empty_like(results).index_copy_(0, order, results)
        by_token = by_token.view(len(hidden), self.per_token, hidden.shape[1])
        return (by_token * weights[:, :, None]).sum(1).to(hidden.dtype)

    def _route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and experts of each token, `[T, k]` each."""
        weights, experts = self.router(hidden).float().softmax(dim=-1).topk(self.per_token, dim=-1)
        if self._normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, experts

    def add_weights(self, weights: Weights, layer: str, names: ExpertNames) -> None:
        """Checkpoints hold each expert by itself."""
        block = f"{layer}.{names.block}"
        weights.add(f"{block}.gate.weight", self.router.weight)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up.detach(), self.down.detach(), strict=True)):
            gate, up = gate_up.chunk(2)
            weights.add(f"{block}.experts.{expert}.{names.gate}.weight", gate)
            weights.add(f"{block}.experts.{expert}.{names.up}.weight", up)
            weights.add(f"{block}.experts.{expert}.{names.down}.weight", down)
