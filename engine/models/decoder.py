"""What a decoder model is to the runner, and where the tensors of a checkpoint go in it."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.models.shard import Shard

if TYPE_CHECKING:
    from engine.attention import AttentionLayer, StepAttention


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """The tokens of a step, of all its sequences one after another; int64, `[T]` each."""

    token_ids: Tensor
    positions: Tensor
    lengths: Tensor
    """By what length of its sequence a token's position is encoded, where that matters; at least position + 1."""

    logit_rows: Tensor | None = None
    """`[R]`: which tokens' logits are wanted, in order; None for all."""

    def select(self, hidden: Tensor) -> Tensor:
        """The rows of `[T, ...]` whose logits are wanted; other rows are not needed after the last attention."""
        return hidden if self.logit_rows is None else hidden.index_select(0, self.logit_rows)


class Decoder(nn.Module):
    """A causal language model over flat tokens: no batch dimension, no padding, no cache of its own."""

    attention_layers: Sequence[AttentionLayer]
    vocab_size: int
    """Columns of the logits."""

    max_positions: int
    """Positions that the model was made for."""

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        """See `Runner.rope_length`."""
        del num_prompt, num_tokens
        return 0

    @abstractmethod
    def forward(self, inputs: TokenInputs, attention: StepAttention) -> Tensor:
        """Logits `[R, vocab]` of the rows that `inputs` asks for; every layer calls `attention` once."""


class NativeDecoder(Decoder):
    """A decoder of our own, whose weights our loader fills."""

    is_tied: bool
    """Whether the head uses the embedding's weight."""

    @abstractmethod
    def weights(self) -> Weights:
        """Where each tensor of a checkpoint goes. The parameters may be on the meta device."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of a checkpoint goes."""

    tensor: Tensor
    """A parameter, or a part of one."""

    transposed: bool = False
    """The checkpoint holds it the other way round."""

    shard: Shard | None = None
    """The part of the tensor that this rank holds, along `dim`; None: all of it."""

    dim: int = 0
    """As the model has it, not transposed."""

    is_zero: bool = False
    """Rank 0 adds it, and here it is zeros: a bias on sums that all ranks contribute to."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor, as the model has it."""
        shape = tuple(self.tensor.shape)
        return shape if self.shard is None else (*shape[: self.dim], self.shard.size, *shape[self.dim + 1 :])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return self.whole_shape[::-1] if self.transposed else self.whole_shape

    def take(self, whole: Any) -> Tensor:
        """What goes into `tensor` of the checkpoint's: a tensor, or for a shard a safetensors slice."""
        if self.shard is None:
            part: Tensor = whole
        else:
            part = self.shard.take(whole, len(self.shape) - 1 - self.dim if self.transposed else self.dim)
        return part.t() if self.transposed else part


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A linear layer of the model, and the weights in `Weights.targets` that its rows consist of, in order."""

    linear: nn.Linear
    names: tuple[str, ...]


HARMLESS = re.compile(
    r"(.*\.)?("
    r"(rotary_emb\.)?inv_freq|rotary_emb\.(original_inv_freq|cos_cached|sin_cached)"  # computed from the configuration
    r"|position_ids|(attn|attention)\.(bias|masked_bias)"  # positions and causal masks
    r"|self_attn\.((attn\.|[kv]_proj\.)?(k|v|kv)_scale|[kv]_proj\.output_scale)"  # calibrated for a KV cache of 8 bits
    r")|(model\.)?mtp(_layers)?\..*"  # heads that predict further tokens
    r"|v_head\..*"  # a value head of reinforcement learning
)
"""Tensors of a checkpoint that change no logits of a causal language model; docs/models.md lists them."""


@dataclass(slots=True)
class Weights:
    """The names of a checkpoint that a model takes.

    Every name in `targets` must be in the checkpoint, and no other may be, except those in `copies` (a tied weight that
    was saved a second time), those that `ignored` matches (parts of a larger model), and what is `HARMLESS`.
    """

    prefix: str = ""
    """What checkpoints of the bare model, without its head, lack in front of each name."""

    targets: dict[str, Target] = field(default_factory=dict)
    linears: list[FusedLinear] = field(default_factory=list)
    """Those of the targets that are nothing but linear layers' weights."""

    copies: dict[str, str] = field(default_factory=dict)
    ignored: Sequence[re.Pattern[str]] = ()
    renames: Sequence[tuple[re.Pattern[str], str]] = ()
    """Replacements in names, for checkpoints in which the model is a part of a larger one."""

    def add(
        self, name: str, parameter: Tensor, *, transposed: bool = False, shard: Shard | None = None, dim: int = 0
    ) -> None:
        """One tensor that is one parameter, or the rank's shard of one along `dim`."""
        held = None if shard is None or shard.is_whole else shard
        self.targets[name] = Target(parameter.detach(), transposed, held, dim)

    def add_linear(
        self,
        name: str,
        linear: nn.Linear | nn.LayerNorm,
        *,
        transposed: bool = False,
        outputs: Shard | None = None,
        inputs: Shard | None = None,
    ) -> None:
        """`name.weight`, and `name.bias` if the layer has one; of a rank that has not all outputs, or not all inputs,
        those that it has."""
        shard, dim = (outputs, 0) if inputs is None else (inputs, 1)
        self.add(f"{name}.weight", linear.weight, transposed=transposed, shard=shard, dim=dim)
        if isinstance(linear, nn.Linear):
            self.linears.append(FusedLinear(linear, (f"{name}.weight",)))
        if linear.bias is not None:
            self.add(f"{name}.bias", linear.bias, shard=outputs)
            if inputs is not None and not inputs.is_first:
                self.targets[f"{name}.bias"] = Target(linear.bias.detach(), is_zero=True)

    def add_fused(self, names: Sequence[str], shards: Sequence[Shard], linear: nn.Linear) -> None:
        """Several linear layers whose outputs are computed as one, `shards[i]` of each."""
        self.linears.append(FusedLinear(linear, tuple(f"{name}.weight" for name in names)))
        for attribute in ("weight", "bias"):
            parameter = getattr(linear, attribute)
            if parameter is not None:
                parts = parameter.detach().split([shard.length for shard in shards])
                for name, part, shard in zip(names, parts, shards, strict=True):
                    self.add(f"{name}.{attribute}", part, shard=shard)

    def ignores(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in (HARMLESS, *self.ignored))

    def resolve(self, name: str) -> str:
        """The name in `targets` of a tensor in a checkpoint; any other name stays as it is."""
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        known = self.targets.keys() | self.copies.keys()
        return self.prefix + name if name not in known and self.prefix + name in known else name
