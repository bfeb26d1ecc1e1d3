"""Sampling parameters as numbers in rows and tensors, the same for the host's sampler and for the device's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.sampling.state import SamplingState
from engine.sampling_params import SamplingParams
from kernels.sampling_fallback import Filters


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides how one sequence's token is sampled from its logits. A filter that is off has its neutral value."""

    temperature: float
    """0: greedy."""

    top_k: int
    top_p: float
    min_p: float
    seed: int
    """The 64 bits as a signed integer."""

    index: int


def sampling_row(state: SamplingState, vocab_size: int) -> SamplingRow:
    params = state.params
    return SamplingRow(
        temperature=0.0 if params.greedy else params.temperature,
        top_k=min(params.top_k or vocab_size, vocab_size),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=_signed(state.seed),
        index=state.index,
    )


def filters_of(params: Sequence[SamplingParams], vocab_size: int) -> Filters:
    """The filters that any of these requests uses."""
    return Filters(
        top_k=max((its.top_k for its in params if 0 < its.top_k < vocab_size), default=0),
        top_p=any(its.top_p < 1.0 for its in params),
        min_p=any(its.min_p > 0.0 for its in params),
    )


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Parameters of a fixed list of sequences, as tensors on the logits' device."""

    states: Sequence[SamplingState]
    samples: bool
    """Whether any row is not greedy."""

    temperature: torch.Tensor
    """`[rows]`, as the next ones; 0: greedy."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    filters: Filters

    logprob_rows: Sequence[int]
    penalized: Sequence[int]
    with_min_tokens: Sequence[int]
    constrained: Sequence[int]
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(repr=False)
    banned: tuple[torch.Tensor, torch.Tensor] | None = field(repr=False)
    allowed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(repr=False)
    """Rows with a list of allowed tokens, then (row, token) of what they allow."""

    @property
    def restricts(self) -> bool:
        """Whether any row's logits are changed before a token is chosen."""
        return bool(
            self.bias or self.banned or self.allowed or self.penalized or self.with_min_tokens or self.constrained
        )

    @classmethod
    def of(cls, states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> SamplingSettings:
        def tensor(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def indices(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
            return tensor([row for row, _ in pairs], torch.int64), tensor([token for _, token in pairs], torch.int64)

        params = [state.params for state in states]
        rows = [sampling_row(state, vocab_size) for state in states]
        bias = [(row, token) for row, p in enumerate(params) for token in p.logit_bias]
        banned = [(row, token) for row, p in enumerate(params) for token in p.banned_token_ids]
        allowed = [(row, token) for row, p in enumerate(params) for token in p.allowed_token_ids or ()]
        allowed_rows = [row for row, p in enumerate(params) if p.allowed_token_ids is not None]
        return cls(
            states=list(states),
            samples=any(not p.greedy for p in params),
            temperature=tensor([row.temperature for row in rows], torch.float32),
            top_k=tensor([row.top_k for row in rows], torch.int64),
            top_p=tensor([row.top_p for row in rows], torch.float32),
            min_p=tensor([row.min_p for row in rows], torch.float32),
            seeds=tensor([row.seed for row in rows], torch.int64),
            indices=tensor([row.index for row in rows], torch.int64),
            filters=filters_of([p for p in params if not p.greedy], vocab_size),
            logprob_rows=[row for row, p in enumerate(params) if p.logprobs is not None],
            penalized=[row for row, p in enumerate(params) if p.penalized],
            with_min_tokens=[row for row, p in enumerate(params) if p.min_tokens],
            constrained=[row for row, state in enumerate(states) if state.matcher is not None],
            bias=(
                (*indices(bias), tensor([b for p in params for b in p.logit_bias.values()], torch.float32))
                if bias
                else None
            ),
            banned=indices(banned) if banned else None,
            allowed=(tensor(allowed_rows, torch.int64), *indices(allowed)) if allowed else None,
        )


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
