"""The Llama line: pre-norm decoders with rotary positions, grouped queries and a gated MLP.

    x = x + out( attention( rotate( norm( qkv( norm(x) ) ) ) ) )        norms of single heads in Qwen3 only
    x = x + mlp( norm(x) )                                              down( silu(gate(x)) * up(x) ), or experts

One file runs all of it; `FAMILIES` says where they differ, and the configuration says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.device.collectives import ALONE, Group
from engine.models.decoder import TokenInputs, Weights
from engine.models.layers import GatedMLP, RMSNorm, head_norms
from engine.models.moe import ExpertNames, SparseMLP
from engine.models.rotary import Rotary, rotate_and_attend, stretched_positions
from engine.models.shard import Shard, shard_heads
from engine.models.stack import StackDecoder, StackNames

if TYPE_CHECKING:
    from engine.attention import StepAttention


@dataclass(frozen=True, slots=True)
class Family:
    """How one family differs from Llama."""

    qkv_bias: bool | None = None
    """None: as `attention_bias` of the configuration says."""

    out_bias: bool | None = None
    head_norms: bool = False
    """Queries and keys are normalized, each head by itself, before they turn."""

    window_everywhere: bool = False
    """A sliding window holds for all layers, not for those that `layer_types` names."""

    saved_fused: bool = False
    """Checkpoints hold query, key and value as one, and gate and up as one."""

    experts: ExpertNames | None = None
    """What a mixture of experts calls its weights."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False, window_everywhere=True),
    "qwen2": Family(qkv_bias=True, out_bias=False),
    "qwen3": Family(head_norms=True),
    "phi3": Family(qkv_bias=False, out_bias=False, window_everywhere=True, saved_fused=True),
    "mixtral": Family(
        qkv_bias=False,
        out_bias=False,
        window_everywhere=True,
        experts=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    "qwen3_moe": Family(
        head_norms=True,
        window_everywhere=True,
        experts=ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
}


class Llama(StackDecoder):
    names = StackNames("model.", "embed_tokens", "layers", "norm")

    def __init__(self, config: Any, group: Group = ALONE) -> None:
        """From transformers' configuration of one of the families; raises `UnsupportedModel`."""
        super().__init__(
            (config.vocab_size, config.hidden_size),
            [_Layer(config, index, group) for index in range(config.num_hidden_layers)],
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            max_positions=stretched_positions(config.rope_parameters, config.max_position_embeddings),
            tied=config.tie_word_embeddings,
            rotary=Rotary(config.rope_parameters, head_dim(config), config.max_position_embeddings),
            group=group,
        )


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self._is_last = index == config.num_hidden_layers - 1
        self._family = family = FAMILIES[config.model_type]
        hidden, eps = config.hidden_size, config.rms_norm_eps
        dim = head_dim(config)
        self._heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, group)
        heads, kv_heads = self._heads.queries.length, self._heads.kv.length
        bias = getattr(config, "attention_bias", False)
        self.attention = AttentionLayer(
            index, heads, kv_heads, dim, dim, dim**-0.5, _sliding_window(config, family, index)
        )
        self.norm_1 = RMSNorm(hidden, eps=eps)
        self.qkv = nn.Linear(
            hidden, (heads + 2 * kv_heads) * dim, bias=bias if family.qkv_bias is None else family.qkv_bias
        )
        self.query_norm = RMSNorm(dim, eps=eps) if family.head_norms else None
        self.key_norm = RMSNorm(dim, eps=eps) if family.head_norms else None
        self.out = nn.Linear(heads * dim, hidden, bias=bias if family.out_bias is None else family.out_bias)
        self.norm_2 = RMSNorm(hidden, eps=eps)
        self.mlp = (
            SparseMLP(config, group)
            if family.experts is not None and _is_sparse(config, index)
            else GatedMLP(
                hidden, config.intermediate_size, config.hidden_act, group, bias=getattr(config, "mlp_bias", False)
            )
        )

    def forward(
        self,
        inputs: TokenInputs,
        hidden: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: StepAttention,
    ) -> tuple[Tensor, Tensor]:
        hidden, normed = self.norm_1.after_adding(hidden, update)
        heads, kv_heads = self.attention.num_heads, self.attention.num_kv_heads
        qkv = self.qkv(normed).view(len(hidden), heads + 2 * kv_heads, self.attention.head_dim)
        query_and_key, value = qkv.split((heads + kv_heads, kv_heads), dim=1)
        norms = head_norms(self.query_norm, self.key_norm)
        attended = rotate_and_attend(attention, self.attention, (query_and_key,), value, cos, sin, norms=norms)
        if self._is_last:
            hidden, attended = inputs.select(hidden), inputs.select(attended)
        hidden, normed = self.norm_2.after_adding(hidden, self._group.all_reduce(self.out(attended.flatten(1))))
        return hidden, self.mlp(normed)

    def add_weights(self, weights: Weights, name: str) -> None:
        family, dim = self._family, self.attention.head_dim
        queries, kv = self._heads.queries.times(dim), self._heads.kv.times(dim)
        weights.add(f"{name}.input_layernorm.weight", self.norm_1.weight)
        if family.saved_fused:
            weights.add_linear(f"{name}.self_attn.qkv_proj", self.qkv, outputs=Shard.stacked([queries, kv, kv]))
        else:
            weights.add_fused([f"{name}.self_attn.{part}_proj" for part in "qkv"], [queries, kv, kv], self.qkv)
        if self.query_norm is not None and self.key_norm is not None:
            weights.add(f"{name}.self_attn.q_norm.weight", self.query_norm.weight)
            weights.add(f"{name}.self_attn.k_norm.weight", self.key_norm.weight)
        weights.add_linear(f"{name}.self_attn.o_proj", self.out, inputs=queries)
        weights.add(f"{name}.post_attention_layernorm.weight", self.norm_2.weight)
        if isinstance(self.mlp, SparseMLP):
            assert family.experts is not None
            self.mlp.add_weights(weights, name, family.experts)
        else:
            self.mlp.add_weights(weights, f"{name}.mlp", saved_fused=family.saved_fused)


def head_dim(config: Any) -> int:
    """Of a transformers configuration that may leave it to be derived."""
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dim


def _sliding_window(config: Any, family: Family, index: int) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    if family.window_everywhere:
        return window
    layer_types = getattr(config, "layer_types", None)
    return window if layer_types is not None and layer_types[index] == "sliding_attention" else None


def _is_sparse(config: Any, index: int) -> bool:
    """Whether a layer has experts: in some models only every so many do."""
    return index not in getattr(config, "mlp_only_layers", ()) and (
        (index + 1) % getattr(config, "decoder_sparse_step", 1) == 0
    )
