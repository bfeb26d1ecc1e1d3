"""Rotary position embeddings (Su et al., arXiv 2104.09864) and the ways to stretch them over longer contexts.

The pair of dimensions (i, i + rot/2) of a head turns by the angle `position * inverse_frequency[i]`.
"""

# The kinds differ in the frequencies, and some scale the result by an attention factor:
#
#     default    base^(-2i/rot)
#     linear     all slower by `factor`                                    (position interpolation, arXiv 2306.15595)
#     dynamic    a base that grows with the sequence's length              (NTK-aware scaling)
#     yarn       slow dimensions as linear, fast ones as default, a ramp between   (arXiv 2309.00071)
#     llama3     the same idea with the wavelength as measure              (Llama 3.1)
#     longrope   one factor a dimension, from a short or a long list by the sequence's length   (arXiv 2402.13753)

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionLayer, RotaryAttention, StepAttention
from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs
from kernels.rms_norm import HeadNorms
from kernels.rotary import rotate

Rope = Mapping[str, Any]

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""Kinds whose frequencies depend on the length of the sequence."""


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """How many dimensions of a head turn."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def stretched_positions(rope: Rope, max_positions: int) -> int:
    """How many positions a model has whose configuration says `max_positions`.

    By custom, that is the number after stretching for llama3 and longrope, the number before for linear and dynamic,
    and for yarn the number before if it equals the original.
    """
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    if kind in ("linear", "dynamic"):
        return int(max_positions * factor)
    if kind == "yarn":
        return max(max_positions, int(rope["original_max_position_embeddings"] * factor))
    return max_positions


def inverse_frequencies(rope: Rope, dim: int, max_positions: int, length: int | None = None) -> tuple[Tensor, float]:
    """`[dim / 2]` float32, and the factor for sine and cosine.

    `rope` is a configuration's `rope_parameters`; `length` is the sequence's, which matters to "dynamic" and "longrope"
    only; None is a short one. Raises `UnsupportedModel` for a kind that is not known.
    """
    kind = rope.get("rope_type", "default")
    base = rope["rope_theta"]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    plain = 1.0 / base**exponents
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "dynamic":
        factor, longest = rope["factor"], max(length or 0, max_positions)
        grown = base * ((factor * longest / max_positions) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / grown**exponents, 1.0
    if kind == "llama3":
        return _llama3(rope, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, base**exponents, dim, max_positions)
    if kind == "longrope":
        return _longrope(rope, base**exponents, max_positions, length)
    raise UnsupportedModel(f"rotary embeddings of the kind {kind!r} are not known")


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    is_between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(is_between, between, slowed)


def _yarn(rope: Rope, powers: Tensor, dim: int, max_positions: int) -> tuple[Tensor, float]:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / original
    base = rope["rope_theta"]

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    scaling = rope.get("attention_factor")
    if scaling is None:
        weight, weight_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scaling = (
            magnitude(factor, weight) / magnitude(factor, weight_all) if weight and weight_all else magnitude(factor)
        )

    def dimension_of(rotations: float) -> float:
        """Which dimension turns so often over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return (1.0 / (factor * powers)) * ramp + (1.0 / powers) * (1 - ramp), float(scaling)


def _longrope(rope: Rope, powers: Tensor, max_positions: int, length: int | None) -> tuple[Tensor, float]:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / original
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = rope["long_factor"] if length and length > original else rope["short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers), float(scaling)


class Rotary(nn.Module):
    """Sine and cosine of a step's tokens, computed once and used by every layer."""

    def __init__(self, rope: Rope, head_dim: int, max_positions: int) -> None:
        """Raises `UnsupportedModel` for an unknown kind."""
        super().__init__()
        self.dim = rotary_dim(rope, head_dim)
        self._rope, self._max_positions = rope, max_positions
        frequencies, self._scaling = inverse_frequencies(rope, self.dim, max_positions)
        self.register_buffer("frequencies", frequencies, persistent=False)
        if rope.get("rope_type") == "longrope":
            self._original: int = rope["original_max_position_embeddings"]
            longer, _ = inverse_frequencies(rope, self.dim, max_positions, self._original + 1)
            self.register_buffer("long_frequencies", longer, persistent=False)

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        """See `Runner.rope_length`.

        Both kinds that depend on length do as transformers' `generate` does. "dynamic": the whole prompt turns by its
        length, each later token by its own position. "longrope": past the original context a sequence starts anew with
        the long factors.
        """
        kind = self._rope.get("rope_type")
        if kind == "dynamic" and num_prompt > self._max_positions:
            return num_prompt
        if kind == "longrope" and num_tokens > self._original:
            return self._original + 1
        return 0

    def forward(self, inputs: TokenInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[T, 1, dim / 2]` in `dtype`."""
        angles = inputs.positions[:, None, None].float() * self._frequencies(inputs)
        return (angles.cos() * self._scaling).to(dtype), (angles.sin() * self._scaling).to(dtype)

    def _frequencies(self, inputs: TokenInputs) -> Tensor:
        """`[dim / 2]`, or `[T, 1, dim / 2]` where they depend on the sequence's length."""
        plain: Tensor = self.get_buffer("frequencies")
        kind = self._rope.get("rope_type")
        if kind == "longrope":
            is_long = inputs.lengths[:, None, None] > self._original
            return torch.where(is_long, self.get_buffer("long_frequencies"), plain)
        if kind == "dynamic":
            factor, dim = self._rope["factor"], self.dim
            longest = inputs.lengths.clamp(min=self._max_positions)[:, None, None].float()
            growth = ((factor * longest / self._max_positions) - (factor - 1)) ** (dim / (dim - 2))
            exponents = torch.arange(0, dim, 2, device=plain.device).float() / dim
            grown: Tensor = 1.0 / (self._rope["rope_theta"] * growth) ** exponents
            return grown
        return plain


def rotate_and_attend(
    attention: StepAttention,
    layer: AttentionLayer,
    unrotated: tuple[Tensor] | tuple[Tensor, Tensor],
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Turn queries and keys, after their norms if there are any, and attend; in one with the write to the cache where
    the attention can.

    `unrotated` is queries and keys side by side, `[T, H + KH, D]`, which turn as one, or both by themselves. With
    `interleaved` neighbours turn together, as in `kernels.rotary`. Returns `[T, H, Dv]`.
    """
    if isinstance(attention, RotaryAttention):
        query, key = _apart(unrotated, layer)
        return attention.rotate_and_attend(layer, query, key, value, cos, sin, interleaved=interleaved, norms=norms)
    if norms is not None:
        unrotated = norms.apply(*_apart(unrotated, layer))
    rotated = tuple(rotate(heads, cos, sin, interleaved=interleaved) for heads in unrotated)
    query, key = _apart(rotated, layer)
    return attention(layer, query, key, value)


def _apart(heads: tuple[Tensor, ...], layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """Queries, and keys."""
    if len(heads) == 1:
        return heads[0][:, : layer.num_heads], heads[0][:, layer.num_heads :]
    query, key = heads
    return query, key
