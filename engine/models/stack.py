"""The plain stack: an embedding, layers that are alike, a norm, and a head for the logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from torch import Tensor, nn

from engine.device.collectives import ALONE, Group
from engine.models.decoder import NativeDecoder, TokenInputs, Weights
from engine.models.layers import LayerNorm, RMSNorm, Stack
from engine.models.rotary import Rotary
from engine.models.shard import shard_vocabulary

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
        embedding: tuple[int, int],
        layers: Sequence[nn.Module],
        norm: LayerNorm | RMSNorm,
        *,
        max_positions: int,
        tied: bool,
        rotary: Rotary | None = None,
        position_embedding: nn.Embedding | None = None,
        head_bias: bool = False,
        group: Group = ALONE,
    ) -> None:
        """`embedding`: tokens and features. `tied`: the head uses the embedding's weight. Positions are told by
        `rotary` or `position_embedding`. `group`: the ranks that share the model; each has its tokens' rows.
        """
        super().__init__()
        self._group = group
        self.vocab_size, features = embedding
        self._tokens = shard_vocabulary(self.vocab_size, group)
        self.max_positions = max_positions
        # In this order random weights are drawn.
        self.embedding = nn.Embedding(self._tokens.length, features)
        self.position_embedding = position_embedding
        self.rotary = rotary
        self.layers: Stack[nn.Module] = Stack(layers)
        self.norm = norm
        self.head = nn.Linear(features, self._tokens.length, bias=head_bias)
        self.is_tied = tied
        if tied:
            self.head.weight = self.embedding.weight
        self.attention_layers = [layer.attention for layer in self._stack()]

    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        _, normed = self.norm.after_adding(*self._run_layers(inputs, self._embed(inputs), attention))
        return self._group.all_gather(self.head(normed), self.vocab_size)

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        return 0 if self.rotary is None else self.rotary.rope_length(num_prompt, num_tokens)

    def weights(self) -> Weights:
        names = self.names
        embedding = f"{names.prefix}{names.embedding}.weight"
        weights = Weights(prefix=names.prefix, ignored=names.ignored, renames=names.renames)
        weights.add(embedding, self.embedding.weight, shard=self._tokens)
        if self.position_embedding is not None:
            weights.add(f"{names.prefix}{names.position_embedding}.weight", self.position_embedding.weight)
        for index, layer in enumerate(self._stack()):
            layer.add_weights(weights, f"{names.prefix}{names.layers}.{index}")
        for name, parameter in self.norm.named_parameters():
            weights.add(f"{names.prefix}{names.norm}.{name}", parameter)
        if not self.is_tied:
            weights.add_linear("lm_head", self.head, outputs=self._tokens)
        else:
            weights.copies["lm_head.weight"] = embedding
            if self.head.bias is not None:
                weights.add("lm_head.bias", self.head.bias, shard=self._tokens)
        return weights

    def _embed(self, inputs: TokenInputs) -> Tensor:
        """`[T, hidden]`: what the first layer is given."""
        if self._tokens.is_whole:
            embedded: Tensor = self.embedding(inputs.token_ids)
            return embedded
        rows = inputs.token_ids - self._tokens.ranges[0].start
        held = rows.clamp(0, self._tokens.length - 1)
        return self._group.all_reduce(self.embedding(held).masked_fill((rows != held)[:, None], 0.0))

    def _run_layers(
        self, inputs: TokenInputs, hidden: Tensor, attention: StepAttention
    ) -> tuple[Tensor, Tensor | None]:
        """`[R, hidden]` each: what the last layer was given, and what it adds to that.

        A layer leaves its last addition to the next norm, because that takes it along in one pass.
        """
        assert self.rotary is not None
        cos, sin = self.rotary(inputs, hidden.dtype)
        update: Tensor | None = None
        for layer in self.layers:
            hidden, update = layer(inputs, hidden, update, cos, sin, attention)
        return hidden, update

    def _stack(self) -> list[StackLayer]:
        return [cast(StackLayer, layer) for layer in self.layers]
