"""The plain stack: an embedding, layers that are alike, a norm, and a head for the logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from torch import Tensor, nn

from engine.models.decoder import NativeDecoder, TokenInputs, Weights
from engine.models.layers import Stack
from engine.models.rotary import Rotary

if TYPE_CHECKING:
    from engine.attention import AttentionLayer, StepAttention


@dataclass(frozen=True, slots=True)
class StackNames:
    """What a checkpoint calls the parts around the layers; its head is always `lm_head`."""

    prefix: str
    """In front of every name but the head's; checkpoints of the bare model lack it."""

    embedding: str
    layers: str
    norm: str
    position_embedding: str = ""
    ignored: Sequence[re.Pattern[str]] = ()
    """See `Weights`."""

    renames: Sequence[tuple[re.Pattern[str], str]] = ()
    """See `Weights`."""


class StackLayer(Protocol):
    """One layer of the stack."""

    attention: AttentionLayer

    def add_weights(self, weights: Weights, name: str) -> None:
        """Name its parts, which stand below `name` in a checkpoint."""


class StackDecoder(NativeDecoder):
    """A decoder that is a plain stack. Subclasses build its parts, and override where they do more."""

    names: ClassVar[StackNames]

    def __init__(
        self,
        embedding: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        *,
        max_positions: int,
        tied: bool,
        rotary: Rotary | None = None,
        position_embedding: nn.Embedding | None = None,
        head_bias: bool = False,
    ) -> None:
        """`tied`: the head uses the embedding's weight. Positions are told by `rotary` or `position_embedding`."""
        super().__init__()
        self.vocab_size = embedding.num_embeddings
        self.max_positions = max_positions
        # In this order random weights are drawn.
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.rotary = rotary
        self.layers: Stack[nn.Module] = Stack(layers)
        self.norm = norm
        self.head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=head_bias)
        self._tied = tied
        if tied:
            self.head.weight = embedding.weight
        self.attention_layers = [layer.attention for layer in self._stack()]

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        hidden = self._run_layers(inputs, self._embed(inputs), attention)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        return 0 if self.rotary is None else self.rotary.rope_length(num_prompt, num_tokens)

    def weights(self) -> Weights:
        names = self.names
        embedding = f"{names.prefix}{names.embedding}.weight"
        weights = Weights(prefix=names.prefix, ignored=names.ignored, renames=names.renames)
        weights.add(embedding, self.embedding.weight)
        if self.position_embedding is not None:
            weights.add(f"{names.prefix}{names.position_embedding}.weight", self.position_embedding.weight)
        for index, layer in enumerate(self._stack()):
            layer.add_weights(weights, f"{names.prefix}{names.layers}.{index}")
        for name, parameter in self.norm.named_parameters():
            weights.add(f"{names.prefix}{names.norm}.{name}", parameter)
        if not self._tied:
            weights.add_linear("lm_head", self.head)
        else:
            weights.copies["lm_head.weight"] = embedding
            if self.head.bias is not None:
                weights.add("lm_head.bias", self.head.bias)
        return weights

    def _embed(self, inputs: TokenInputs) -> Tensor:
        """`[T, hidden]`: what the first layer is given."""
        embedded: Tensor = self.embedding(inputs.token_ids)
        return embedded

    def _run_layers(self, inputs: TokenInputs, hidden: Tensor, attention: StepAttention) -> Tensor:
        """The last layer's output, `[R, hidden]`."""
        assert self.rotary is not None
        cos, sin = self.rotary(inputs, hidden.dtype)
        for layer in self.layers:
            hidden = layer(inputs, hidden, cos, sin, attention)
        return hidden

    def _stack(self) -> list[StackLayer]:
        return [cast(StackLayer, layer) for layer in self.layers]
