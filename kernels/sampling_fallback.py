"""Choosing tokens from logits in plain torch: what `sampling.py` does where there is no kernel.

             ┌─ no top-k, no top-p ── all tokens ──────────── blocks' sums ─ one block ─┐
logits / T ──┤                                                                          ├─ token
             └─ else ─ the 64 best ── 512 ── 4096 ── all, sorted ─ ─── what is kept ────┘
                          └── only rows that need more go on ──┘
"""

# A draw inverts the cumulative distribution in order of token id, with one uniform number a row. A row's way through
# this is decided by its own logits and parameters, so its token does not depend on what else is in the batch.

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.philox import uniform

NOT_FINITE = -2
"""In the place of a token: the largest logit is no finite number, or some logit is NaN."""

NONE_ALLOWED = -3
"""In the place of a token: all logits are -inf."""

TOO_LARGE = -4
"""In the place of a token: the largest logit divided by the temperature is no finite number."""

_NEG_INF = float("-inf")

# How many of the best tokens are looked at, one step after the other: enough for nearly every nucleus and usual k.
_WIDTHS = (64, 512, 4096)

# Tokens whose probabilities are summed at once while a draw over the whole vocabulary is located.
_BLOCK = 256

# Elements of the rows that are sorted as a whole at once (1 GiB with what a sort needs).
_MAX_SORTED = 2**26


@dataclass(frozen=True, slots=True)
class Filters:
    """Which filters any row uses, known without asking the device."""

    top_k: int
    """The largest k of any row; 0: none filters."""

    top_p: bool
    min_p: bool

    @property
    def any(self) -> bool:
        return bool(self.top_k or self.top_p or self.min_p)


@dataclass(frozen=True, slots=True)
class _FilterParams:
    """What each row keeps: tensors `[rows]`, with k = vocab_size, p = 1 and min_p = 0 where it is not filtered so."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    filters: Filters

    def at(self, rows: torch.Tensor) -> _FilterParams:
        return _FilterParams(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.filters)


def argmax_fallback(logits: torch.Tensor, *, is_static: bool = False) -> torch.Tensor:
    """See `kernels.sampling.argmax`."""
    if logits.device.type == "cpu" and not is_static:
        # NumPy's is vectorized: torch's own takes ten times as long.
        tokens = torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    else:
        tokens = logits.argmax(dim=-1)
    # Both take a NaN for the largest.
    highest = logits.gather(1, tokens[:, None])[:, 0]
    tokens = torch.where(highest == _NEG_INF, NONE_ALLOWED, tokens)
    return torch.where(highest < torch.inf, tokens, NOT_FINITE)


def sample_fallback(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    *,
    filters: Filters,
    is_static: bool = False,
) -> torch.Tensor:
    """See `kernels.sampling.sample`."""
    logits = logits.float()
    tokens = argmax_fallback(logits, is_static=is_static)
    is_random = temperature != 0
    divisor = torch.where(is_random, temperature, 1.0)
    highest = logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    tokens = torch.where((tokens >= 0) & ~torch.isfinite(highest / divisor), TOO_LARGE, tokens)
    parameters = (temperature, top_k, top_p, min_p, seeds, positions, indices)
    if is_static:
        parameters = (divisor, *parameters[1:])
    elif not bool(is_random.all()):
        rows = is_random.nonzero().squeeze(-1)
        if len(rows):
            drawn = _draw(logits[rows], *(values[rows] for values in parameters), filters=filters, is_static=False)
            tokens[rows] = torch.where(tokens[rows] < 0, tokens[rows], drawn)
        return tokens
    drawn = _draw(logits, *parameters, filters=filters, is_static=is_static)
    return torch.where(is_random & (tokens >= 0), drawn, tokens)


def _draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    *,
    filters: Filters,
    is_static: bool,
) -> torch.Tensor:
    """A token from each row's filtered distribution; float32 logits, which are overwritten, and no temperature of 0.

    Rows without a sound distribution get some token.
    """
    draws = uniform(seeds, positions, indices)
    logits.div_(temperature[:, None])
    params = _FilterParams(top_k, top_p, min_p, filters)
    if is_static or not (filters.top_k or filters.top_p):
        return _draw_from_all(filter_logits(logits, top_k, top_p, min_p, filters), draws)
    is_filtered = (top_k < logits.shape[1]) | (top_p < 1.0)
    if bool(is_filtered.all()):
        return _sample_from_top_candidates(logits, draws, params)
    tokens = torch.empty_like(positions)
    rows = is_filtered.nonzero().squeeze(-1)
    tokens[rows] = _sample_from_top_candidates(logits[rows], draws[rows], params.at(rows))
    rows = (~is_filtered).nonzero().squeeze(-1)
    only_min_p = Filters(top_k=0, top_p=False, min_p=filters.min_p)
    kept = filter_logits(logits[rows], top_k[rows], top_p[rows], min_p[rows], only_min_p)
    tokens[rows] = _draw_from_all(kept, draws[rows])
    return tokens


def filter_logits(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, filters: Filters
) -> torch.Tensor:
    """Set what top-k, then top-p, then min-p remove to -inf, in place: what is to be drawn from, by definition.

    Logits are float `[rows, vocab_size]`; the parameters are `[rows]`, with k = vocab_size, p = 1 and min_p = 0 for
    rows that do not filter. Tokens that tie with the last one kept are kept too.
    """
    vocab_size = logits.shape[1]
    if filters.top_k:
        width = min(filters.top_k, vocab_size)
        least = logits.topk(width, dim=-1).values.gather(1, (top_k.clamp(max=width) - 1)[:, None])
        logits.masked_fill_((logits < least) & (top_k < vocab_size)[:, None], _NEG_INF)
    if filters.top_p:
        ranked = logits.sort(dim=-1, descending=True).values
        least = _nucleus_end(ranked, ranked.logsumexp(dim=-1, keepdim=True), top_p)
        logits.masked_fill_((logits < least) & (top_p < 1.0)[:, None], _NEG_INF)
    if filters.min_p:
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + min_p[:, None].log(), _NEG_INF)
    return logits


def _nucleus_end(ranked: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least logit in the nucleus, `[rows, 1]`, as far as it is in descending logits `[rows, width]`.

    A token is in when those before it hold less than top_p of `exp(total)`.
    """
    probs = (ranked - total).exp()
    inside = (probs.cumsum(dim=-1) - probs) < top_p[:, None]
    inside[:, 0] = True
    return ranked.gather(1, inside.sum(dim=-1, keepdim=True) - 1)


# Rows without top-k and top-p


def _draw_from_all(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Over the whole vocabulary: first the block in which the draw falls, then the token in it."""
    num_rows, vocab_size = logits.shape
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    num_whole = vocab_size // _BLOCK
    # A block's sum in float32 is right to 1e-7, and ten times as fast as in float64; many sums need more.
    sums = weights[:, : num_whole * _BLOCK].view(num_rows, num_whole, _BLOCK).sum(dim=-1)
    rest = weights[:, num_whole * _BLOCK :].sum(dim=-1, keepdim=True)
    sums = torch.cat((sums, rest), dim=-1).double()
    reached = sums.cumsum(dim=-1)
    targets = draws[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached, targets, right=True).clamp_(max=num_whole)

    ids = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = weights.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill_(ids >= vocab_size, 0.0)
    place = _searchsorted(inside, targets - (reached.gather(1, block) - sums.gather(1, block)))
    return ids.gather(1, place).squeeze(-1).clamp_(max=vocab_size - 1)


def _searchsorted(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The place `[rows, 1]` at which the sum of the weights `[rows, width]` passes each target `[rows, 1]`."""
    reached = weights.cumsum(dim=-1, dtype=torch.float64)
    # A target may come from a sum that was rounded otherwise: it must stay among the tokens that have any weight.
    targets = torch.minimum(targets, reached[:, -1:] * (1 - 2**-40)).clamp_(min=0.0)
    found = torch.searchsorted(reached, targets, right=True)
    return found.clamp_(max=weights.shape[1] - 1)  # passed only by rows that are not sound


# Rows with top-k or top-p


def _sample_from_top_candidates(logits: torch.Tensor, draws: torch.Tensor, params: _FilterParams) -> torch.Tensor:
    """From the best tokens; where what is kept may reach beyond them, from more of them, and at last from all."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    left = torch.arange(num_rows, device=logits.device)
    for width in _WIDTHS:
        if width >= vocab_size or not len(left):
            break
        whole = logits if len(left) == num_rows else logits[left]
        best, ids = _best(whole, width)
        least, is_covered = _least_kept(best, whole, params.at(left))
        drawn = _draw_from_candidates(best, ids, least, draws[left])
        tokens[left[is_covered]] = drawn[is_covered]
        left = left[~is_covered]
    for rows in torch.split(left, max(1, _MAX_SORTED // vocab_size)) if len(left) else ():
        its = params.at(rows)
        kept = filter_logits(logits[rows], its.top_k, its.top_p, its.min_p, its.filters)
        tokens[rows] = _draw_from_all(kept, draws[rows])
    return tokens


def _best(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` highest logits of each row, descending, and their token ids.

    Looked for among the groups of tokens whose own highest is among the `width` highest: the best are nowhere else, and
    a fraction of the vocabulary is looked at twice instead of sorting all of it.
    """
    num_rows, vocab_size = logits.shape
    span = int((vocab_size / width) ** 0.5)
    if span < 3:
        values, ids = logits.topk(width, dim=-1)
        return values, ids
    # Group g holds the tokens g, g + groups, g + 2 groups ...: the maximum runs along the memory's order.
    groups = vocab_size // span
    peaks = logits[:, : groups * span].view(num_rows, span, groups).amax(dim=1)
    chosen = peaks.topk(min(width, groups), dim=-1, sorted=False).indices
    ids = (chosen[:, None, :] + (torch.arange(span, device=logits.device) * groups)[:, None]).flatten(1)
    rest = torch.arange(groups * span, vocab_size, device=logits.device)
    ids = torch.cat((ids, rest.expand(num_rows, -1)), dim=-1)
    values, places = logits.gather(1, ids).topk(width, dim=-1)
    return values, ids.gather(1, places)


def _least_kept(best: torch.Tensor, logits: torch.Tensor, params: _FilterParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The least logit that is kept, `[rows, 1]`, and whether all that is kept is among `best`, `[rows]`.

    `best` `[rows, width]` are the highest of `logits`, descending. Where the lowest of them is not kept, nothing beyond
    them is, and ties are complete.
    """
    width, vocab_size = best.shape[1], logits.shape[1]
    by_k = params.top_k < vocab_size
    least = best.gather(1, (params.top_k.clamp(max=width) - 1)[:, None])
    least = torch.where(by_k[:, None], least, _NEG_INF)
    is_covered = by_k & (params.top_k <= width) & (best[:, -1:] < least).squeeze(-1)
    if params.filters.top_p:
        kept = best.masked_fill(best < least, _NEG_INF)
        total = kept.logsumexp(dim=-1, keepdim=True)
        if not bool(by_k.all()):  # without top-k, p is a share of what all tokens have
            total = torch.where(by_k[:, None], total, logits.logsumexp(dim=-1, keepdim=True))
        end = _nucleus_end(kept, total, params.top_p)
        by_p = params.top_p < 1.0
        least = torch.where(by_p[:, None], torch.maximum(least, end), least)
        is_covered |= ~by_k & by_p & (best[:, -1:] < end).squeeze(-1)
    if params.filters.min_p:
        least = torch.maximum(least, best[:, :1] + params.min_p[:, None].log())
    return least, is_covered


def _draw_from_candidates(
    best: torch.Tensor, ids: torch.Tensor, least: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """From what is kept of some tokens `[rows, width]`, in order of their ids."""
    weights = (best - best[:, :1]).exp_().masked_fill_(best < least, 0.0)
    ids, order = ids.sort(dim=-1)
    weights = weights.gather(1, order)
    targets = draws[:, None] * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return ids.gather(1, _searchsorted(weights, targets)).squeeze(-1)
