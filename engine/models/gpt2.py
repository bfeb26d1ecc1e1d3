"""GPT-2 (Radford et al., 2019): learned positions, layer norm first, one projection for query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.errors import UnsupportedModel
from engine.models.decoder import NativeDecoder, TokenInputs, Weights
from engine.models.layers import Activated, LayerNorm, Stack

if TYPE_CHECKING:
    from engine.attention import StepAttention


class GPT2(NativeDecoder):
    def __init__(self, config: Any) -> None:
        """From a transformers `GPT2Config`; raises `UnsupportedModel`."""
        super().__init__()
        if config.add_cross_attention:
            raise UnsupportedModel("GPT-2 with cross-attention needs an encoder")
        hidden = config.n_embd
        self.vocab_size = config.vocab_size
        self.max_positions = config.n_positions
        self.token_embedding = nn.Embedding(config.vocab_size, hidden)
        self.position_embedding = nn.Embedding(config.n_positions, hidden)
        self.layers: Stack[_Layer] = Stack(_Layer(config, index) for index in range(config.n_layer))
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False)
        self._tied = config.tie_word_embeddings
        if self._tied:
            self.head.weight = self.token_embedding.weight
        self.attention_layers = [layer.attention for layer in self.layers]

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        hidden = self.token_embedding(inputs.token_ids) + self.position_embedding(inputs.positions)
        for layer in self.layers:
            hidden = layer(inputs, hidden, attention)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def weights(self) -> Weights:
        weights = Weights(prefix="transformer.")
        weights.add("transformer.wte.weight", self.token_embedding.weight)
        weights.add("transformer.wpe.weight", self.position_embedding.weight)
        for index, layer in enumerate(self.layers):
            layer.add_weights(weights, f"transformer.h.{index}")
        weights.add_linear("transformer.ln_f", self.norm)
        if self._tied:
            weights.copies["lm_head.weight"] = "transformer.wte.weight"
        else:
            weights.add_linear("lm_head", self.head)
        return weights


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self._is_last = index == config.n_layer - 1
        hidden, heads = config.n_embd, config.n_head
        head_dim = hidden // heads
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        self.attention = AttentionLayer(index, heads, heads, head_dim, head_dim, scale)
        inner = config.n_inner if config.n_inner is not None else 4 * hidden
        self.norm_1 = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm_2 = LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.up = Activated(nn.Linear(hidden, inner), config.activation_function)
        self.down = nn.Linear(inner, hidden)

    def forward(self, inputs: TokenInputs, hidden: Tensor, attention: StepAttention) -> Tensor:
        heads = self.qkv(self.norm_1(hidden)).view(len(hidden), 3, self.attention.num_heads, self.attention.head_dim)
        query, key, value = heads.unbind(1)
        attended = attention(self.attention, query, key, value)
        if self._is_last:
            hidden, attended = inputs.select(hidden), inputs.select(attended)
        hidden, normed = self.norm_2.after_adding(hidden, self.out(attended.flatten(1)))
        result: Tensor = hidden + self.down(self.up(normed))
        return result

    def add_weights(self, weights: Weights, name: str) -> None:
        # The checkpoint's `Conv1D` layers hold their weights [in, out].
        weights.add_linear(f"{name}.ln_1", self.norm_1)
        weights.add_linear(f"{name}.attn.c_attn", self.qkv, transposed=True)
        weights.add_linear(f"{name}.attn.c_proj", self.out, transposed=True)
        weights.add_linear(f"{name}.ln_2", self.norm_2)
        weights.add_linear(f"{name}.mlp.c_fc", self.up.linear, transposed=True)
        weights.add_linear(f"{name}.mlp.c_proj", self.down, transposed=True)
