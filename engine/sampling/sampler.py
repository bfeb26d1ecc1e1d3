"""From logits to tokens, for a whole batch at once.

    logits ─ bias ─ penalties ─ bans ─┬─ argmax ─────────────────────────────── greedy rows
                                      └─ temperature ─ top-k ─ top-p ─ min-p ─ draw ── random rows

Each row is computed from its own logits, parameters and Philox draw alone: what else is in the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import RequestFailed
from engine.outputs import TokenLogprobs
from engine.sampling.settings import SamplingSettings, filters_of
from engine.sampling.state import SamplingState
from engine.sampling_params import MAX_LOGPROBS
from kernels.launch import aligned
from kernels.log_probs import log_probs
from kernels.penalties import penalize
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import Filters

if TYPE_CHECKING:
    from engine.grammar.matcher import MaskFiller

NO_NUMBERS = "the model's logits are not finite numbers"
LOGITS_TOO_LARGE = "logit_bias, penalties or the temperature make the logits too large"
NO_TOKEN_ALLOWED = "no token is allowed here by the request's parameters"

_NEG_INF = float("-inf")

# Tokens of a mask that are a byte each at a time (64 MiB).
_UNPACKED = 2**26


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for one row: a token, or the reason why there is none."""

    token_id: int = -1
    logprobs: TokenLogprobs | None = None
    error: RequestFailed | None = None
    ends: bool = False
    """The output is complete by its grammar, and has no further token."""


def _unset(words: npt.NDArray[np.int32], size: int, device: torch.device) -> torch.Tensor:
    """Which of the first `size` bits of each row are 0; bool `[rows, size]`, unpacked where they are needed."""
    unset = ~words.view(np.uint8)
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(unset, axis=1, count=size, bitorder="little").view(np.bool_))
    octets = torch.from_numpy(unset).to(device)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    return ((octets[:, :, None] >> bits) & 1).flatten(1)[:, :size].bool()


class Sampler:
    """Chooses the next token of each row."""

    def __init__(self, vocab_size: int, *, row_by_row: bool = False) -> None:
        """`row_by_row` draws for each row by itself, so that not even rounding depends on how many there are."""
        self.vocab_size = vocab_size
        self._row_by_row = row_by_row
        self._settings: SamplingSettings | None = None
        self._masks: MaskFiller | None = None

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """Logits are float32 `[rows, vocab_size]`, one row a state, and are overwritten."""
        errors: dict[int, RequestFailed] = {}
        ended: set[int] = set()
        settings = self._settings_of(states, logits)
        scores = _scores(logits, settings.logprob_rows)

        # The maximum of a row with a NaN is NaN.
        sound = torch.isfinite(logits.amax(dim=-1))
        allowed = sound
        if settings.restricts:
            self._restrict(logits, states, settings)
            if settings.constrained:
                ended = self._constrain(logits, states, settings.constrained, errors)
            allowed = logits.amax(dim=-1) > _NEG_INF
        # Of what is drawn from: a bias, a penalty or the temperature may have made a sound row infinite.
        temperature = torch.where(settings.temperature == 0, 1.0, settings.temperature)
        highest = logits.amax(dim=-1)
        usable = torch.isfinite(highest / temperature) | (highest == _NEG_INF)
        tokens = self._sample_tokens(logits, states, settings)

        # One copy to the host.
        chosen, are_sound, are_allowed, are_usable = torch.stack((tokens, sound, allowed, usable)).tolist()
        for row in range(len(states)):
            if not are_sound[row]:
                errors.setdefault(row, RequestFailed(NO_NUMBERS))
            elif not are_usable[row]:
                errors.setdefault(row, RequestFailed(LOGITS_TOO_LARGE))
            elif not are_allowed[row] and row not in ended:
                errors.setdefault(row, RequestFailed(NO_TOKEN_ALLOWED))

        top = _top_logprobs(scores, settings, tokens, states)
        return [
            Sampled(error=errors[row])
            if row in errors
            else Sampled(ends=True)
            if row in ended
            else Sampled(token, top.get(row))
            for row, token in enumerate(chosen)
        ]

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, for prompt logprobs; logits are float32 `[tokens, vocab_size]`."""
        targets = torch.tensor(token_ids, device=logits.device)
        return _read_logprobs(logits, targets, [num_top] * len(token_ids))

    def _settings_of(self, states: Sequence[SamplingState], logits: torch.Tensor) -> SamplingSettings:
        """In a run of pure decode steps the same sequences come again: keep what does not change."""
        settings = self._settings
        if (
            settings is None
            or len(settings.states) != len(states)
            or settings.temperature.device != logits.device
            or any(old is not new for old, new in zip(settings.states, states, strict=True))
        ):
            settings = self._settings = SamplingSettings.of(states, self.vocab_size, logits.device)
        return settings

    def _restrict(
        self,
        logits: torch.Tensor,
        states: Sequence[SamplingState],
        settings: SamplingSettings,
    ) -> None:
        """Apply bias, penalties and bans in place."""
        if settings.bias is not None:
            rows, ids, values = settings.bias
            logits[rows, ids] += values
        if settings.penalized:
            self._penalize(logits, states, settings.penalized)
        if settings.allowed is not None:
            rows, kept_rows, kept_ids = settings.allowed
            kept = logits[kept_rows, kept_ids]
            logits[rows] = _NEG_INF
            logits[kept_rows, kept_ids] = kept
        if settings.banned is not None:
            rows, ids = settings.banned
            logits[rows, ids] = _NEG_INF

        stop_tokens_banned_until_min = [
            (row, token)
            for row in settings.with_min_tokens
            if states[row].num_output < states[row].params.min_tokens
            for token in states[row].stop_tokens_banned_until_min
        ]
        if stop_tokens_banned_until_min:
            rows, ids = torch.tensor(stop_tokens_banned_until_min, device=logits.device).unbind(1)
            logits[rows, ids] = _NEG_INF

    def _penalize(self, logits: torch.Tensor, states: Sequence[SamplingState], penalized: Sequence[int]) -> None:
        counts = [states[row].counts for row in penalized]
        present = [
            (row, held) for row, held in zip(penalized, counts, strict=True) if held is not None and len(held.ids)
        ]
        if not present:
            return
        lengths = [len(held.ids) for _, held in present]
        rows = torch.from_numpy(np.repeat(np.array([row for row, _ in present], np.int64), lengths)).to(logits.device)
        ids = torch.from_numpy(np.concatenate([held.ids for _, held in present])).to(logits.device)
        count = torch.from_numpy(np.concatenate([held.counts for _, held in present])).to(logits.device)
        params = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (s.params for s in states)]
        # Each parameter's numbers in a row, all of which start aligned.
        columns = torch.zeros(3, aligned(len(states), 4))[:, : len(states)].copy_(torch.tensor(params).t())
        penalize(logits, rows, ids, count, *columns.to(logits.device))

    def _constrain(
        self,
        logits: torch.Tensor,
        states: Sequence[SamplingState],
        rows: Sequence[int],
        errors: dict[int, RequestFailed],
    ) -> set[int]:
        """Ban what the rows' grammars do not allow; returns the rows whose output is complete."""
        if self._masks is None:
            from engine.grammar.matcher import MaskFiller

            self._masks = MaskFiller()
        matchers = [matcher for row in rows if (matcher := states[row].matcher) is not None]
        masks = self._masks.fill(matchers, [states[row].params.ignore_eos for row in rows])
        errors.update((rows[place], error) for place, error in masks.failed.items())
        size = max(1, _UNPACKED // self.vocab_size)
        for start in range(0, len(rows), size):
            banned = _unset(masks.words[start : start + size], self.vocab_size, logits.device)
            if len(rows) == len(logits):
                logits[start : start + size].masked_fill_(banned, _NEG_INF)
            else:
                places = torch.tensor(rows[start : start + size], device=logits.device)
                logits[places] = logits[places].masked_fill_(banned, _NEG_INF)
        return {rows[place] for place in masks.complete}

    def _sample_tokens(
        self, logits: torch.Tensor, states: Sequence[SamplingState], settings: SamplingSettings
    ) -> torch.Tensor:
        """Token ids or codes, as `kernels.sampling.sample` gives them. Logits may be overwritten."""
        if not settings.samples:
            return argmax(logits)
        positions = torch.tensor([state.position for state in states], device=logits.device)

        def part(rows: slice, filters: Filters) -> torch.Tensor:
            return sample(
                logits[rows],
                settings.temperature[rows],
                settings.top_k[rows],
                settings.top_p[rows],
                settings.min_p[rows],
                settings.seeds[rows],
                positions[rows],
                settings.indices[rows],
                filters=filters,
            )

        if not self._row_by_row:
            return part(slice(None), settings.filters)
        rows = range(len(states))
        return torch.cat([part(slice(row, row + 1), filters_of([states[row].params], self.vocab_size)) for row in rows])


def _scores(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor | None:
    """Copy the logits of rows that asked for log-probabilities, before sampling overwrites them."""
    if not rows:
        return None
    return logits.clone() if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]


def _top_logprobs(
    scores: torch.Tensor | None, settings: SamplingSettings, tokens: torch.Tensor, states: Sequence[SamplingState]
) -> dict[int, TokenLogprobs]:
    if scores is None:
        return {}
    rows = settings.logprob_rows
    # Codes have no log-probability: their rows fail.
    chosen = tokens[torch.tensor(rows, device=tokens.device)].clamp(min=0)
    found = _read_logprobs(scores, chosen, [states[row].params.logprobs or 0 for row in rows])
    return dict(zip(rows, found, strict=True))


def _read_logprobs(scores: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Bring the wanted log-probabilities to the host, in one copy a tensor; `scores` are logits."""
    width = min(MAX_LOGPROBS, scores.shape[-1]) if any(num_top) else 0
    chosen, values, _ = log_probs(scores, token_ids, width)
    ids = _highest(scores, width)
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, row_ids, row_values, count in zip(
            token_ids.tolist(), chosen.tolist(), ids.tolist(), values.tolist(), num_top, strict=True
        )
    ]


def _highest(logits: torch.Tensor, width: int) -> torch.Tensor:
    """The tokens of the `width` highest logits, int64 `[rows, width]`; of equals the lower id first, as in greedy."""
    if width == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    values, ids = logits.topk(width, dim=-1)
    ids = ids.sort(dim=-1).values
    ids = ids.gather(-1, logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)
    # Where the last one has equals that were left out, `topk` may have taken any of them.
    cut = ((logits >= values[:, -1:]).sum(dim=-1) > width).nonzero().squeeze(-1)
    if len(cut):
        ids[cut] = logits[cut].sort(dim=-1, descending=True, stable=True).indices[:, :width]
    return ids
