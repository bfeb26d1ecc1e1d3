"""Mixtures of experts: each token goes through the few MLPs that a router picks for it.

p = softmax(router(x));   out = sum over the k largest p_e of  p_e * expert_e(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device.collectives import Group
from engine.models.decoder import Weights
from engine.models.layers import activation
from engine.models.shard import shard
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

    def __init__(self, config: Any, group: Group) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self._group = group
        # Each rank has a part of every expert, so that all have the same to do.
        self._inner = shard(getattr(config, "moe_intermediate_size", None) or config.intermediate_size, group)
        inner = self._inner.length
        self.per_token: int = config.num_experts_per_tok
        """Experts that a token goes through."""

        self._normalized = getattr(config, "norm_topk_prob", True)
        self._activation = activation(config.hidden_act)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        """How rows are multiplied with an expert's weight where there is no kernel for the whole mixture."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        return self._group.all_reduce(
            expert_mlp(
                hidden,
                self.router(hidden),
                self.gate_up,
                self.down,
                self.per_token,
                normalized=self._normalized,
                activation=self._activation,
                product=self.product,
            )
        )

    def add_weights(self, weights: Weights, layer: str, names: ExpertNames) -> None:
        """Checkpoints hold each expert by itself."""
        block = f"{layer}.{names.block}"
        weights.add(f"{block}.gate.weight", self.router.weight)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up.detach(), self.down.detach(), strict=True)):
            gate, up = gate_up.chunk(2)
            weights.add(f"{block}.experts.{expert}.{names.gate}.weight", gate, shard=self._inner)
            weights.add(f"{block}.experts.{expert}.{names.up}.weight", up, shard=self._inner)
            weights.add(f"{block}.experts.{expert}.{names.down}.weight", down, shard=self._inner, dim=1)
