"""GPT-2 (Radford et al., 2019): learned positions, layer norm first, one projection for query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.device.collectives import ALONE, Group
from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs, Weights
from engine.models.layers import Activated, LayerNorm
from engine.models.shard import Shard, shard, shard_heads
from engine.models.stack import StackDecoder, StackNames

if TYPE_CHECKING:
    from engine.attention import StepAttention


class GPT2(StackDecoder):
    names = StackNames("transformer.", "wte", "h", "ln_f", position_embedding="wpe")

    def __init__(self, config: Any, group: Group = ALONE) -> None:
        """From a transformers `GPT2Config`; raises `UnsupportedModel`."""
        if config.add_cross_attention:
            raise UnsupportedModel("GPT-2 with cross-attention needs an encoder")
        super().__init__(
            (config.vocab_size, config.n_embd),
            [_Layer(config, index, group) for index in range(config.n_layer)],
            LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            max_positions=config.n_positions,
            tied=config.tie_word_embeddings,
            position_embedding=nn.Embedding(config.n_positions, config.n_embd),
            group=group,
        )

    def _embed(self, inputs: TokenInputs) -> Tensor:
        assert self.position_embedding is not None
        embedded: Tensor = super()._embed(inputs) + self.position_embedding(inputs.positions)
        return embedded

    def _run_layers(
        self, inputs: TokenInputs, hidden: Tensor, attention: StepAttention
    ) -> tuple[Tensor, Tensor | None]:
        update: Tensor | None = None
        for layer in self.layers:
            hidden, update = layer(inputs, hidden, update, attention)
        return hidden, update


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self._is_last = index == config.n_layer - 1
        hidden, head_dim = config.n_embd, config.n_embd // config.n_head
        self._heads = shard_heads(config.n_head, config.n_head, group).queries
        heads = self._heads.length
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        self.attention = AttentionLayer(index, heads, heads, head_dim, head_dim, scale)
        self._inner = shard(config.n_inner if config.n_inner is not None else 4 * hidden, group)
        inner = self._inner.length
        self.norm_1 = LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, hidden)
        self.norm_2 = LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.up = Activated(nn.Linear(hidden, inner), config.activation_function)
        self.down = nn.Linear(inner, hidden)

    def forward(
        self, inputs: TokenInputs, hidden: Tensor, update: Tensor | None, attention: StepAttention
    ) -> tuple[Tensor, Tensor]:
        hidden, normed = self.norm_1.after_adding(hidden, update)
        heads = self.qkv(normed).view(len(hidden), 3, self.attention.num_heads, self.attention.head_dim)
        query, key, value = heads.unbind(1)
        attended = attention(self.attention, query, key, value)
        if self._is_last:
            hidden, attended = inputs.select(hidden), inputs.select(attended)
        hidden, normed = self.norm_2.after_adding(hidden, self._group.all_reduce(self.out(attended.flatten(1))))
        return hidden, self._group.all_reduce(self.down(self.up(normed)))

    def add_weights(self, weights: Weights, name: str) -> None:
        # The checkpoint's `Conv1D` layers hold their weights [in, out].
        heads = self._heads.times(self.attention.head_dim)
        weights.add_linear(f"{name}.ln_1", self.norm_1)
        weights.add_linear(f"{name}.attn.c_attn", self.qkv, transposed=True, outputs=Shard.stacked([heads] * 3))
        weights.add_linear(f"{name}.attn.c_proj", self.out, transposed=True, inputs=heads)
        weights.add_linear(f"{name}.ln_2", self.norm_2)
        weights.add_linear(f"{name}.mlp.c_fc", self.up.linear, transposed=True, outputs=self._inner)
        weights.add_linear(f"{name}.mlp.c_proj", self.down, transposed=True, inputs=self._inner)
