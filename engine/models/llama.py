"""The Llama line: Llama, Mistral, Qwen2 and Qwen3, which differ by what their configurations say.

    x = x + out( attention( rotate( norm( qkv( norm(x) ) ) ) ) )        head norms in Qwen3 only
    x = x + down( silu(gate(norm(x))) * up(norm(x)) )

|         | qkv bias       | out bias       | head norms | sliding window                     |
|---------|----------------|----------------|------------|------------------------------------|
| Llama   | attention_bias | attention_bias | no         | no                                 |
| Mistral | no             | no             | no         | all layers, if there is one        |
| Qwen2   | yes            | no             | no         | "sliding_attention" of layer_types |
| Qwen3   | attention_bias | attention_bias | yes        | "sliding_attention" of layer_types |
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.models.decoder import Decoder, TokenInputs, Weights
from engine.models.layers import GatedMLP, Stack
from engine.models.rotary import Rotary, rotate

if TYPE_CHECKING:
    from engine.attention import StepAttention


class Llama(Decoder):
    def __init__(self, config: Any) -> None:
        """From transformers' configuration of one of the families; raises `UnsupportedModel`."""
        super().__init__()
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.rope_parameters, _head_dim(config), config.max_position_embeddings)
        self.layers: Stack[_Layer] = Stack(_Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tied = config.tie_word_embeddings
        if self._tied:
            self.head.weight = self.embedding.weight
        self.attention_layers = [layer.attention for layer in self.layers]

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        hidden = self.embedding(inputs.token_ids)
        cos, sin = self.rotary(inputs, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attention)
        result: Tensor = self.norm(hidden)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.head(hidden)
        return result

    def weights(self) -> Weights:
        weights = Weights(prefix="model.", ignored=[re.compile(r".*\.rotary_emb\.inv_freq")])
        weights.add("model.embed_tokens.weight", self.embedding.weight)
        for index, layer in enumerate(self.layers):
            layer.add_weights(weights, f"model.layers.{index}")
        weights.add("model.norm.weight", self.norm.weight)
        if self._tied:
            weights.copies["lm_head.weight"] = "model.embed_tokens.weight"
        else:
            weights.add_linear("lm_head", self.head)
        return weights


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        hidden, eps, family = config.hidden_size, config.rms_norm_eps, config.model_type
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
        qkv_bias = family == "qwen2" or getattr(config, "attention_bias", False)
        out_bias = family != "qwen2" and getattr(config, "attention_bias", False)
        self.attention = AttentionLayer(
            index, heads, kv_heads, head_dim, head_dim, head_dim**-0.5, _sliding_window(config, index)
        )
        self.norm_1 = nn.RMSNorm(hidden, eps=eps)
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * head_dim, bias=qkv_bias)
        self.query_norm = nn.RMSNorm(head_dim, eps=eps) if family == "qwen3" else None
        self.key_norm = nn.RMSNorm(head_dim, eps=eps) if family == "qwen3" else None
        self.out = nn.Linear(heads * head_dim, hidden, bias=out_bias)
        self.norm_2 = nn.RMSNorm(hidden, eps=eps)
        self.mlp = GatedMLP(
            hidden, config.intermediate_size, config.hidden_act, bias=getattr(config, "mlp_bias", False)
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: StepAttention) -> Tensor:
        heads, kv_heads = self.attention.num_heads, self.attention.num_kv_heads
        qkv = self.qkv(self.norm_1(hidden)).view(len(hidden), heads + 2 * kv_heads, self.attention.head_dim)
        if self.query_norm is None or self.key_norm is None:
            # What turns stands side by side, and turns as one.
            turned = rotate(qkv[:, : heads + kv_heads], cos, sin)
            query, key = turned[:, :heads], turned[:, heads:]
        else:
            query = rotate(self.query_norm(qkv[:, :heads]), cos, sin)
            key = rotate(self.key_norm(qkv[:, heads : heads + kv_heads]), cos, sin)
        attended = attention(self.attention, query, key, qkv[:, heads + kv_heads :])
        hidden = hidden + self.out(attended.flatten(1))
        result: Tensor = hidden + self.mlp(self.norm_2(hidden))
        return result

    def add_weights(self, weights: Weights, name: str) -> None:
        layer = self.attention
        sizes = [layer.num_heads * layer.head_dim, *[layer.num_kv_heads * layer.head_dim] * 2]
        weights.add(f"{name}.input_layernorm.weight", self.norm_1.weight)
        weights.add_fused([f"{name}.self_attn.{part}_proj" for part in "qkv"], sizes, self.qkv)
        if self.query_norm is not None and self.key_norm is not None:
            weights.add(f"{name}.self_attn.q_norm.weight", self.query_norm.weight)
            weights.add(f"{name}.self_attn.k_norm.weight", self.key_norm.weight)
        weights.add_linear(f"{name}.self_attn.o_proj", self.out)
        weights.add(f"{name}.post_attention_layernorm.weight", self.norm_2.weight)
        inner = self.mlp.down.in_features
        weights.add_fused([f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], [inner, inner], self.mlp.gate_up)
        weights.add_linear(f"{name}.mlp.down_proj", self.mlp.down)


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _sliding_window(config: Any, index: int) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return window
    layer_types = getattr(config, "layer_types", None)
    return window if layer_types is not None and layer_types[index] == "sliding_attention" else None
