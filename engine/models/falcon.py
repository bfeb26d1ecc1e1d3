"""Falcon (Almazrouei et al., arXiv 2311.16867), in the arrangements that its checkpoints have.

    7B     x = x + out( attention( norm(x) ) ) + mlp( norm(x) )             one KV head for all
    40B    x = x + out( attention( norm_a(x) ) ) + mlp( norm_m(x) )         one KV head a group; two norms or one
    RW     x = x + out( attention( norm(x) ) );  x = x + mlp( norm_2(x) )   one after the other

Query, key and value come out of one projection, KV head by KV head: the group's queries, then its key and its value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.device.collectives import ALONE, Group
from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs, Weights
from engine.models.layers import Activated, LayerNorm
from engine.models.rotary import Rotary, rotate_and_attend, stretched_positions
from engine.models.shard import HeadShards, Shard, shard, shard_heads
from engine.models.stack import StackDecoder, StackNames

if TYPE_CHECKING:
    from engine.attention import StepAttention


class Falcon(StackDecoder):
    names = StackNames("transformer.", "word_embeddings", "h", "ln_f")

    def __init__(self, config: Any, group: Group = ALONE) -> None:
        """From a transformers `FalconConfig`; raises `UnsupportedModel`."""
        if config.alibi:
            raise UnsupportedModel(
                "models of the type 'falcon' are not supported where they bias attention by distance (ALiBi)"
            )
        super().__init__(
            (config.vocab_size, config.hidden_size),
            [_Layer(config, index, group) for index in range(config.num_hidden_layers)],
            LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
            max_positions=stretched_positions(config.rope_parameters, config.max_position_embeddings),
            tied=config.tie_word_embeddings,
            rotary=Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings),
            group=group,
        )


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self._is_last = index == config.num_hidden_layers - 1
        hidden, dim = config.hidden_size, config.head_dim
        is_new = config.new_decoder_architecture
        self._heads = shard_heads(
            config.num_attention_heads, 1 if config.multi_query and not is_new else config.num_kv_heads, group
        )
        heads, kv_heads = self._heads.queries.length, self._heads.kv.length
        self._inner = shard(config.ffn_hidden_size, group)
        inner = self._inner.length
        self.attention = AttentionLayer(index, heads, kv_heads, dim, dim, dim**-0.5)
        self._is_parallel = is_new or config.parallel_attn
        self._has_two_norms = is_new and config.num_ln_in_parallel_attn != 1
        self.norm_1 = LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.norm_2 = (
            LayerNorm(hidden, eps=config.layer_norm_epsilon) if self._has_two_norms or not self._is_parallel else None
        )
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * dim, bias=config.bias)
        self.out = nn.Linear(heads * dim, hidden, bias=config.bias)
        self.up = Activated(nn.Linear(hidden, inner, bias=config.bias), config.activation)
        self.down = nn.Linear(inner, hidden, bias=config.bias)

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
        attended = self._attend(normed, cos, sin, attention)
        if self._is_last:
            hidden, normed, attended = (inputs.select(rows) for rows in (hidden, normed, attended))
        attended = self.out(attended)
        if self.norm_2 is not None:
            update = None if self._is_parallel else self._group.all_reduce(attended)
            hidden, normed = self.norm_2.after_adding(hidden, update)
        mlp = self.down(self.up(normed))
        return hidden, self._group.all_reduce(mlp + attended if self._is_parallel else mlp)

    def _attend(self, normed: Tensor, cos: Tensor, sin: Tensor, attention: StepAttention) -> Tensor:
        kv_heads, dim = self.attention.num_kv_heads, self.attention.head_dim
        qkv = self.qkv(normed).view(len(normed), kv_heads, -1, dim)
        unrotated = (qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2])
        return rotate_and_attend(attention, self.attention, unrotated, qkv[:, :, -1], cos, sin).flatten(1)

    def add_weights(self, weights: Weights, name: str) -> None:
        dim = self.attention.head_dim
        weights.add_linear(f"{name}.{'ln_attn' if self._has_two_norms else 'input_layernorm'}", self.norm_1)
        if self.norm_2 is not None:
            weights.add_linear(f"{name}.{'ln_mlp' if self._has_two_norms else 'post_attention_layernorm'}", self.norm_2)
        weights.add_linear(
            f"{name}.self_attention.query_key_value", self.qkv, outputs=_shard_saved(self._heads).times(dim)
        )
        weights.add_linear(f"{name}.self_attention.dense", self.out, inputs=self._heads.queries.times(dim))
        weights.add_linear(f"{name}.mlp.dense_h_to_4h", self.up.linear, outputs=self._inner)
        weights.add_linear(f"{name}.mlp.dense_4h_to_h", self.down, inputs=self._inner)


def _shard_saved(heads: HeadShards) -> Shard:
    """Heads as the checkpoint holds them in one projection: each group's queries, then its key and its value."""
    group = heads.queries.size // heads.kv.size
    ranges = []
    for kv in heads.kv.ranges[0]:
        queries = heads.queries.ranges[0]
        first, end = max(queries.start, kv * group), min(queries.stop, (kv + 1) * group)
        ranges += [range(first + 2 * kv, end + 2 * kv), range((kv + 1) * group + 2 * kv, (kv + 1) * (group + 2))]
    return Shard(heads.queries.size + 2 * heads.kv.size, tuple(ranges))
