"""GPT-J (Wang and Komatsuzaki, 2021): attention and MLP side by side behind one norm, rotary positions in pairs.

x = x + out( attention( rotate( qkv( norm(x) ) ) ) ) + down( act( up( norm(x) ) ) )
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.device.collectives import ALONE, Group
from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs, Weights
from engine.models.layers import Activated, LayerNorm
from engine.models.rotary import Rotary, rotate_and_attend
from engine.models.shard import shard, shard_heads
from engine.models.stack import StackDecoder, StackNames

if TYPE_CHECKING:
    from engine.attention import StepAttention


class GPTJ(StackDecoder):
    names = StackNames("transformer.", "wte", "h", "ln_f")

    def __init__(self, config: Any, group: Group = ALONE) -> None:
        """From a transformers `GPTJConfig`; raises `UnsupportedModel`."""
        if config.rotary_dim is None:
            raise UnsupportedModel("GPT-J without rotary_dim is not known")
        super().__init__(
            (config.vocab_size, config.n_embd),
            [_Layer(config, index, group) for index in range(config.n_layer)],
            LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            max_positions=config.n_positions,
            tied=config.tie_word_embeddings,
            rotary=Rotary({"rope_theta": 10_000.0}, config.rotary_dim, config.n_positions),
            head_bias=True,
            group=group,
        )


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self._is_last = index == config.n_layer - 1
        hidden, head_dim = config.n_embd, config.n_embd // config.n_head
        self._heads = shard_heads(config.n_head, config.n_head, group).queries
        self._inner = shard(config.n_inner if config.n_inner is not None else 4 * hidden, group)
        heads, inner = self._heads.length, self._inner.length
        self.attention = AttentionLayer(index, heads, heads, head_dim, head_dim, head_dim**-0.5)
        self.norm = LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.up = Activated(nn.Linear(hidden, inner), config.activation_function)
        self.down = nn.Linear(inner, hidden)

    def forward(
        self,
        inputs: TokenInputs,
        hidden: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: StepAttention,
    ) -> tuple[Tensor, Tensor]:
        hidden, normed = self.norm.after_adding(hidden, update)
        heads = self.attention.num_heads
        qkv = self.qkv(normed).view(len(hidden), 3 * heads, self.attention.head_dim)
        unrotated = (qkv[:, : 2 * heads],)
        attended = rotate_and_attend(
            attention, self.attention, unrotated, qkv[:, 2 * heads :], cos, sin, interleaved=True
        )
        if self._is_last:
            hidden, normed, attended = (inputs.select(rows) for rows in (hidden, normed, attended))
        hidden = hidden + self._group.all_reduce(self.out(attended.flatten(1)))
        return hidden, self._group.all_reduce(self.down(self.up(normed)))

    def add_weights(self, weights: Weights, name: str) -> None:
        weights.add_linear(f"{name}.ln_1", self.norm)
        heads = self._heads.times(self.attention.head_dim)
        weights.add_fused([f"{name}.attn.{part}_proj" for part in "qkv"], [heads] * 3, self.qkv)
        weights.add_linear(f"{name}.attn.out_proj", self.out, inputs=heads)
        weights.add_linear(f"{name}.mlp.fc_in", self.up.linear, outputs=self._inner)
        weights.add_linear(f"{name}.mlp.fc_out", self.down, inputs=self._inner)
