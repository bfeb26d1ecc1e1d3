"""Gemma 2 and Gemma 3 (arXiv 2408.00118, 2503.19786).

    x = x + norm( out( attention( rotate( qkv( norm(x) ) ) ) ) )        head norms in Gemma 3 only
    x = x + norm( down( gelu(gate(norm(x))) * up(norm(x)) ) )

Norms scale by 1 + weight, embeddings by the root of their size. Layers with a sliding window alternate with full ones
(`layer_types`); in Gemma 3 the two kinds turn at different frequencies. Gemma 2 caps attention scores and logits.
Of a multimodal Gemma 3, the text part runs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.device.collectives import ALONE, Group
from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs, Weights
from engine.models.layers import GatedMLP, OffsetRMSNorm, head_norms
from engine.models.rotary import LENGTH_DEPENDENT, Rotary, rotate_and_attend
from engine.models.shard import shard_heads
from engine.models.stack import StackDecoder, StackNames

if TYPE_CHECKING:
    from engine.attention import StepAttention

_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_TEXT_OF_MULTIMODAL = (
    (re.compile(r"^(model\.language_model|language_model\.model)\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


class Gemma(StackDecoder):
    names = StackNames("model.", "embed_tokens", "layers", "norm", ignored=[_VISION], renames=_TEXT_OF_MULTIMODAL)

    def __init__(self, config: Any, group: Group = ALONE) -> None:
        """From transformers' configuration; raises `UnsupportedModel`."""
        text = getattr(config, "text_config", None) or config
        if getattr(text, "use_bidirectional_attention", None):
            raise UnsupportedModel("Gemma with bidirectional attention does not generate text")
        if any(_rope(text, kind).get("rope_type") in LENGTH_DEPENDENT for kind in text.layer_types):
            raise UnsupportedModel("Gemma with rotary embeddings that depend on length is not known")
        super().__init__(
            (text.vocab_size, text.hidden_size),
            [_Layer(text, index, group) for index in range(text.num_hidden_layers)],
            OffsetRMSNorm(text.hidden_size, eps=text.rms_norm_eps),
            max_positions=text.max_position_embeddings,
            tied=config.tie_word_embeddings,
            group=group,
        )
        self._scale = text.hidden_size**0.5
        self._kinds = tuple(dict.fromkeys(text.layer_types))
        self.rotaries = nn.ModuleDict(
            {kind: Rotary(_rope(text, kind), text.head_dim, text.max_position_embeddings) for kind in self._kinds}
        )
        self._logit_cap = text.final_logit_softcapping

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        logits = super().forward(inputs, attention)
        if self._logit_cap is not None:
            logits = self._logit_cap * torch.tanh(logits / self._logit_cap)
        return logits

    def _embed(self, inputs: TokenInputs) -> Tensor:
        embedded = super()._embed(inputs)
        # Rounded to the model's type, as it was in training.
        return embedded * torch.tensor(self._scale, dtype=embedded.dtype, device="cpu")

    def _run_layers(
        self, inputs: TokenInputs, hidden: Tensor, attention: StepAttention
    ) -> tuple[Tensor, Tensor | None]:
        angles = {kind: self.rotaries[kind](inputs, hidden.dtype) for kind in self._kinds}
        update: Tensor | None = None
        for layer in self.layers:
            hidden, update = layer(inputs, hidden, update, *angles[cast(str, layer.kind)], attention)
        return hidden, update


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self._is_last = index == config.num_hidden_layers - 1
        hidden, eps, dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        self._heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, group)
        heads, kv_heads = self._heads.queries.length, self._heads.kv.length
        is_gemma_2 = config.model_type == "gemma2"
        self.kind: str = config.layer_types[index]
        self.attention = AttentionLayer(
            index,
            heads,
            kv_heads,
            dim,
            dim,
            config.query_pre_attn_scalar**-0.5,
            config.sliding_window if self.kind == "sliding_attention" else None,
            config.attn_logit_softcapping if is_gemma_2 else None,
        )
        self.norm_1 = OffsetRMSNorm(hidden, eps=eps)
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * dim, bias=config.attention_bias)
        self.query_norm = None if is_gemma_2 else OffsetRMSNorm(dim, eps=eps)
        self.key_norm = None if is_gemma_2 else OffsetRMSNorm(dim, eps=eps)
        self.out = nn.Linear(heads * dim, hidden, bias=config.attention_bias)
        self.norm_2 = OffsetRMSNorm(hidden, eps=eps)
        self.norm_3 = OffsetRMSNorm(hidden, eps=eps)
        self.mlp = GatedMLP(hidden, config.intermediate_size, config.hidden_activation, group)
        self.norm_4 = OffsetRMSNorm(hidden, eps=eps)

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
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        norms = head_norms(self.query_norm, self.key_norm)
        attended = rotate_and_attend(attention, self.attention, (query, key), value, cos, sin, norms=norms)
        if self._is_last:
            hidden, attended = inputs.select(hidden), inputs.select(attended)
        update = self.norm_2(self._group.all_reduce(self.out(attended.flatten(1))))
        hidden, normed = self.norm_3.after_adding(hidden, update)
        return hidden, self.norm_4(self.mlp(normed))

    def add_weights(self, weights: Weights, name: str) -> None:
        dim = self.attention.head_dim
        queries, kv = self._heads.queries.times(dim), self._heads.kv.times(dim)
        weights.add(f"{name}.input_layernorm.weight", self.norm_1.weight)
        weights.add_fused([f"{name}.self_attn.{part}_proj" for part in "qkv"], [queries, kv, kv], self.qkv)
        if self.query_norm is not None and self.key_norm is not None:
            weights.add(f"{name}.self_attn.q_norm.weight", self.query_norm.weight)
            weights.add(f"{name}.self_attn.k_norm.weight", self.key_norm.weight)
        weights.add_linear(f"{name}.self_attn.o_proj", self.out, inputs=queries)
        weights.add(f"{name}.post_attention_layernorm.weight", self.norm_2.weight)
        weights.add(f"{name}.pre_feedforward_layernorm.weight", self.norm_3.weight)
        self.mlp.add_weights(weights, f"{name}.mlp")
        weights.add(f"{name}.post_feedforward_layernorm.weight", self.norm_4.weight)


def _rope(config: Any, kind: str) -> Any:
    """Gemma 3 has one set of parameters for each kind of layer, Gemma 2 one for all."""
    return config.rope_parameters.get(kind, config.rope_parameters)
