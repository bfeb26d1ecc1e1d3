"""Attention by Triton kernels: on a GPU, or slowly, for tests, in Triton's interpreter on the CPU.

Sequences with one new token go through the decode kernel, which splits long ones; prompts and chunks through the
prefill kernel. Both work on the same buffers and each leaves the other's rows alone, so that a mixed step is two
launches and no sorting. Each kernel follows a plan that a small kernel makes on the device, once a step for all layers
of like shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.interface import DecodeMetadata, RotaryAttention, StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from engine.device.transfer import to_device
from engine.errors import ModelError
from kernels import shared_prefix
from kernels.device import device_of
from kernels.integers import ceil_div
from kernels.kv_write import rotate_and_write_kv, write_kv
from kernels.launch import aligned
from kernels.paged_decode import DecodePlan, paged_decode, plan_decode
from kernels.paged_layout import AttentionMetadata, StepSequences
from kernels.paged_prefill import PrefillPlan, paged_prefill, plan_prefill, prefill_tiles
from kernels.prefix_groups import LEAST_SHARED, PrefixGroups, find_shared_prefixes
from kernels.rms_norm import HeadNorms

_MAX_HEAD_DIM = 256
# Block numbers in a row of a table that is sent, or a multiple: 64 bytes.
_TABLE_WIDTH = 16


@dataclass(frozen=True, slots=True)
class _DeviceLayout:
    """Where the tokens of a step stand, on the device: what kernels read."""

    sequences: StepSequences
    slots: Tensor
    """`[T]`: where each token's key and value go."""

    has_decodes: bool
    """Whether any sequence may have one new token."""

    has_prefills: bool
    """Whether any may have more."""


class TritonAttention:
    """Triton kernels over the paged cache, with their buffers, which grow to the largest step.

    Buffers that were outgrown are kept, since a CUDA graph may remember where they are.
    """

    def __init__(self, device: torch.device, *, shares_prefixes: bool = False) -> None:
        """`shares_prefixes` reads blocks that neighbours in a step begin with once for them all.

        Raises `ModelError` when Triton cannot run on the device.
        """
        try:
            self._target = device_of(device)
        except ValueError as error:
            raise ModelError(str(error)) from error
        self._device = device
        self._shares_prefixes = shares_prefixes
        self._decode_plans: dict[Hashable, list[DecodePlan]] = {}
        self._prefill_plans: dict[int, list[PrefillPlan]] = {}
        self._query_starts: dict[int, Tensor] = {}

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        """See `AttentionBackend`."""
        return _TritonStep(self, _on_device(layout, self._device), cache)

    def prepare_decode(self, layout: DecodeMetadata, cache: KVCache) -> StepAttention:
        """See `CapturableAttention`."""
        num_sequences = len(layout.lengths)
        if num_sequences not in self._query_starts:
            self._query_starts[num_sequences] = torch.arange(num_sequences + 1, dtype=torch.int32, device=self._device)
        on_device = _DeviceLayout(
            StepSequences(layout.block_tables, layout.lengths, self._query_starts[num_sequences]),
            layout.slots,
            has_decodes=True,
            has_prefills=False,
        )
        return _TritonStep(self, on_device, cache)

    def reserve(self, layers: Sequence[AttentionLayer], *, kv_dtype: torch.dtype, max_sequences: int) -> None:
        """See `CapturableAttention`."""
        for layer in layers:
            self.decode_plan(layer, kv_dtype, max_sequences)

    def decode_plan(self, layer: AttentionLayer, kv_dtype: torch.dtype, num_sequences: int) -> DecodePlan:
        """The plan that a layer's decodes follow; layers of the same shape share it."""
        if max(layer.head_dim, layer.value_dim) > _MAX_HEAD_DIM:
            raise ModelError(
                f"heads of {max(layer.head_dim, layer.value_dim)} numbers are too large for the Triton kernels "
                f"({_MAX_HEAD_DIM}); set attention='torch'"
            )
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim, layer.sliding_window, kv_dtype)
        plans = self._decode_plans.setdefault(shape, [])
        if not plans or plans[-1].max_sequences < num_sequences:
            plans.append(
                DecodePlan.allocate(
                    _room(num_sequences),
                    num_heads=layer.num_heads,
                    num_kv_heads=layer.num_kv_heads,
                    head_dim=layer.head_dim,
                    value_dim=layer.value_dim,
                    kv_dtype=kv_dtype,
                    window=layer.sliding_window,
                    device=self._device,
                    groups=self._groups(layer, kv_dtype, _room(num_sequences)),
                )
            )
        return plans[-1]

    def _groups(self, layer: AttentionLayer, kv_dtype: torch.dtype, max_sequences: int) -> PrefixGroups | None:
        if not self._shares_prefixes or layer.sliding_window is not None or kv_dtype is torch.float8_e4m3fn:
            return None
        return shared_prefix.prefix_groups(
            max_sequences,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            dtype=kv_dtype,
            kv_dtype=kv_dtype,
            device=self._device,
            least=LEAST_SHARED,
        )

    def prefill_plan(
        self, layer: AttentionLayer, dtype: torch.dtype, num_tokens: int, num_sequences: int
    ) -> PrefillPlan:
        """The plan that a layer's prompts follow; layers whose blocks hold as many tokens share it."""
        group = layer.num_heads // layer.num_kv_heads
        block_q = prefill_tiles(group, layer.head_dim, layer.value_dim, dtype, self._target).block_q(group)
        plans = self._prefill_plans.setdefault(block_q, [])
        num_blocks = num_tokens // block_q + num_sequences
        if not plans or plans[-1].max_blocks < num_blocks:
            plans.append(PrefillPlan.allocate(_room(num_blocks), block_q=block_q, device=self._device))
        return plans[-1]


class _TritonStep(RotaryAttention):
    def __init__(self, backend: TritonAttention, layout: _DeviceLayout, cache: KVCache) -> None:
        self._backend, self._layout, self._cache = backend, layout, cache
        self._planned: set[int] = set()

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        write_kv(_rows(key), _rows(value), self._cache.layers[layer.index], self._layout.slots)
        return self._attend(layer, _rows(query), sinks)

    def rotate_and_attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool,
        norms: HeadNorms | None,
    ) -> Tensor:
        query, key, value = (_rows(heads) for heads in (query, key, value))
        cache, slots = self._cache.layers[layer.index], self._layout.slots
        rotated = rotate_and_write_kv(query, key, value, cos, sin, cache, slots, interleaved=interleaved, norms=norms)
        return self._attend(layer, rotated, None)

    def _attend(self, layer: AttentionLayer, query: Tensor, sinks: Tensor | None) -> Tensor:
        """With queries `[T, H, D]`, rotated where they have to be, over a cache that has the step's keys and values."""
        layout, cache, scoring = self._layout, self._cache.layers[layer.index], layer.scoring(sinks)
        sequences, num_sequences = layout.sequences, len(layout.sequences.seq_lens)
        out = torch.empty(*query.shape[:2], layer.value_dim, dtype=query.dtype, device=query.device)
        if layout.has_decodes:
            decodes = self._backend.decode_plan(layer, cache.keys.dtype, num_sequences)
            if self._is_new(decodes):
                if decodes.groups is not None:
                    find_shared_prefixes(decodes.groups, sequences, cache.block_size)
                plan_decode(decodes, sequences.seq_lens, sequences.query_starts)
            if decodes.groups is None:
                paged_decode(query, cache, sequences, decodes, out, scoring)
            else:
                shared_prefix.paged_decode_with_shared_prefixes(query, cache, sequences, decodes, out, scoring)
        if layout.has_prefills:
            prefills = self._backend.prefill_plan(layer, query.dtype, len(query), num_sequences)
            if self._is_new(prefills):
                plan_prefill(prefills, sequences.query_starts, len(query))
            paged_prefill(query, cache, sequences, prefills, out, scoring)
        return out

    def _is_new(self, plan: object) -> bool:
        """Whether no layer of this step has filled the plan before."""
        is_new = id(plan) not in self._planned
        self._planned.add(id(plan))
        return is_new


def _on_device(layout: AttentionMetadata, device: torch.device) -> _DeviceLayout:
    """One transfer for all."""
    num_sequences, width = layout.block_tables.shape
    padded_width = ceil_div(width, _TABLE_WIDTH) * _TABLE_WIDTH
    lengths_at = num_sequences * padded_width
    starts_at = lengths_at + aligned(num_sequences, 4)
    packed = np.zeros(starts_at + num_sequences + 1, np.int32)
    packed[:lengths_at].reshape(num_sequences, padded_width)[:, :width] = layout.block_tables
    packed[lengths_at : lengths_at + num_sequences] = layout.starts + layout.query_lens
    np.cumsum(layout.query_lens, out=packed[starts_at + 1 :])
    on_device = to_device(packed, device)
    return _DeviceLayout(
        StepSequences(
            block_tables=on_device[:lengths_at].view(num_sequences, padded_width),
            seq_lens=on_device[lengths_at : lengths_at + num_sequences],
            query_starts=on_device[starts_at:],
        ),
        layout.slots,
        has_decodes=bool((layout.query_lens == 1).any()),
        has_prefills=bool((layout.query_lens > 1).any()),
    )


def _rows(heads: Tensor) -> Tensor:
    """Heads whose numbers follow each other, as kernels read them."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _room(needed: int) -> int:
    """The next power of two, and no fewer than 64."""
    return max(64, 1 << (needed - 1).bit_length())
