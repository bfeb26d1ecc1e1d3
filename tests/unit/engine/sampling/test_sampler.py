"""The sampler against transformers' logits processors, and its draws against the distribution they should follow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers.generation import logits_process as hf

from engine import SamplingParams
from engine.sampling.sampler import Sampler
from engine.sampling.state import SamplingState
from engine.sampling.token_counts import TokenCounts
from kernels.philox import uniform
from kernels.sampling_fallback import NONE_ALLOWED, Filters, argmax_fallback, filter_logits, sample_fallback

VOCAB = 1003


def fixed_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def state(
    params: SamplingParams,
    *,
    position: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stop_tokens_banned_until_min: Sequence[int] = (),
    index: int = 0,
) -> SamplingState:
    counts = TokenCounts(prompt) if params.penalized else None
    for token in output:
        if counts is not None:
            counts.add(token)
    seed = params.seed or 0
    return SamplingState(
        params,
        seed,
        index,
        position,
        num_output=len(output),
        stop_tokens_banned_until_min=stop_tokens_banned_until_min,
        counts=counts,
    )


def filtered(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    rows, vocab = logits.shape
    return filter_logits(
        logits.clone(),
        torch.full((rows,), top_k or vocab),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        Filters(top_k=top_k, top_p=top_p < 1.0, min_p=min_p > 0.0),
    )


NO_IDS = torch.zeros((1, 0), dtype=torch.int64)


class TestFiltersAgreeWithTransformers:
    """The same logits are -inf, and the rest is untouched."""

    @pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
    @pytest.mark.parametrize("top_k", [1, 2, 50, 1002, 1003])
    def test_top_k_agrees_with_transformers(self, top_k: int, scale: float) -> None:
        logits = fixed_logits(8, scale=scale)
        assert torch.equal(filtered(logits, top_k=top_k), hf.TopKLogitsWarper(top_k)(NO_IDS, logits))

    @pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
    @pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
    def test_top_p_agrees_with_transformers(self, top_p: float, scale: float) -> None:
        """At scale 0.1 the nucleus is wider than the candidates that are looked at first."""
        logits = fixed_logits(8, scale=scale)
        assert torch.equal(filtered(logits, top_p=top_p), hf.TopPLogitsWarper(top_p)(NO_IDS, logits))

    @pytest.mark.parametrize("scale", [0.1, 3.0])
    @pytest.mark.parametrize("min_p", [0.001, 0.1, 0.5, 1.0])
    def test_min_p_agrees_with_transformers(self, min_p: float, scale: float) -> None:
        logits = fixed_logits(8, scale=scale)
        assert torch.equal(filtered(logits, min_p=min_p), hf.MinPLogitsWarper(min_p)(NO_IDS, logits))

    def test_filters_apply_in_order(self) -> None:
        logits = fixed_logits(8)
        expected = hf.TemperatureLogitsWarper(1.7)(NO_IDS, logits)
        for warper in (hf.TopKLogitsWarper(40), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.05)):
            expected = warper(NO_IDS, expected)
        assert torch.equal(filtered(logits / 1.7, top_k=40, top_p=0.9, min_p=0.05), expected)

    def test_filters_of_a_batch_are_those_of_each_row(self) -> None:
        logits = fixed_logits(5)
        top_k, top_p, min_p = [3, VOCAB, VOCAB, 10, VOCAB], [1.0, 0.7, 1.0, 0.5, 1.0], [0.0, 0.0, 0.2, 0.0, 0.0]
        together = filter_logits(
            logits.clone(), torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p), Filters(10, True, True)
        )
        for row in range(5):
            alone = filtered(logits[row : row + 1], top_k[row] % VOCAB, top_p[row], min_p[row])
            assert torch.equal(together[row : row + 1], alone)

    @pytest.mark.parametrize("vocab", [3, 300])
    def test_top_p_excludes_tokens_after_those_that_hold_exactly_p(self, vocab: int) -> None:
        """As transformers does; a draw beyond p would find them."""
        logits = torch.full((1, vocab), -math.inf)
        logits[0, :3] = torch.tensor([0.5, 0.25, 0.25]).log()
        assert filtered(logits, top_p=0.5).isfinite().nonzero().tolist() == [[0, 0]]
        assert torch.equal(filtered(logits, top_p=0.5), hf.TopPLogitsWarper(0.5)(NO_IDS, logits))
        assert filtered(logits, top_p=0.500001).isfinite().sum() == 3
        states = [state(SamplingParams(seed=seed, top_p=0.5)) for seed in range(20)]
        sampled = Sampler(vocab).sample(logits.expand(20, vocab).clone(), states)
        assert {row.token_id for row in sampled} == {0}

    def test_tokens_that_tie_are_kept_together(self) -> None:
        logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
        assert filtered(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]
        assert filtered(logits, top_p=0.6).isfinite().tolist() == [[True, True, True, False]]


class SpySampler(Sampler):
    """Keeps the logits that the tokens are chosen from."""

    def _sample_tokens(self, logits: torch.Tensor, *args: object) -> torch.Tensor:
        self.seen = logits.clone()
        return super()._sample_tokens(logits, *args)  # type: ignore[arg-type]


def restricted(logits: torch.Tensor, *states: SamplingState) -> torch.Tensor:
    sampler = SpySampler(logits.shape[-1])
    sampler.sample(logits.clone(), states)
    return sampler.seen


class TestRestrictions:
    PROMPT, OUTPUT = [5, 6, 7, 6], [7, 8, 8, 8, 9]

    def test_repetition_penalty_agrees_with_transformers(self) -> None:
        logits = fixed_logits(1)
        got = restricted(logits, state(SamplingParams(repetition_penalty=1.3), prompt=self.PROMPT, output=self.OUTPUT))
        ids = torch.tensor([self.PROMPT + self.OUTPUT])
        assert torch.equal(got, hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))

    def test_frequency_and_presence_count_the_output_only(self) -> None:
        logits = fixed_logits(1)
        params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
        got = restricted(logits, state(params, prompt=self.PROMPT, output=self.OUTPUT))
        expected = logits.clone()
        for token in set(self.OUTPUT):
            expected[0, token] -= 0.5 * self.OUTPUT.count(token) + 0.25
        torch.testing.assert_close(got, expected)
        assert torch.equal(got[0, 5], logits[0, 5])

    def test_counts_grow_with_the_output(self) -> None:
        """Past the first allocation, where arrays are copied."""
        counts = TokenCounts([1, 2, 1])
        for token in range(300):
            counts.add(token % 150)
        expected = dict.fromkeys(range(150), 2.0)
        assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected

    def test_sequence_bias_agrees_with_transformers(self) -> None:
        logits = fixed_logits(1)
        bias = {3: 5.0, 900: -2.5}
        processor = hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
        got = restricted(logits, state(SamplingParams(logit_bias=bias)))
        torch.testing.assert_close(got, processor(torch.tensor([[1, 2]]), logits.clone()))

    def test_banned_tokens_agree_with_transformers(self) -> None:
        logits = fixed_logits(1)
        got = restricted(logits, state(SamplingParams(banned_token_ids=[0, 7, 1002])))
        assert torch.equal(got, hf.SuppressTokensLogitsProcessor([0, 7, 1002])(NO_IDS, logits.clone()))

    def test_allowed_token_ids_are_all_that_is_sampled(self) -> None:
        logits = fixed_logits(2)
        got = restricted(logits, state(SamplingParams(allowed_token_ids=[4, 9])), state(SamplingParams()))
        assert got[0].isfinite().nonzero().flatten().tolist() == [4, 9]
        assert torch.equal(got[0, [4, 9]], logits[0, [4, 9]])
        assert torch.equal(got[1], logits[1])

    @pytest.mark.parametrize(("num_output", "held"), [(0, True), (2, True), (3, False), (4, False)])
    def test_min_tokens_agrees_with_transformers(self, num_output: int, held: bool) -> None:
        logits = fixed_logits(1)
        got = restricted(
            logits, state(SamplingParams(min_tokens=3), output=[1] * num_output, stop_tokens_banned_until_min=[2, 60])
        )
        processor = hf.MinNewTokensLengthLogitsProcessor(2, 3, [2, 60])
        ids = torch.ones((1, 2 + num_output), dtype=torch.int64)
        assert torch.equal(got, processor(ids, logits.clone()))
        assert bool(got[0, 2].isinf()) is held

    def test_sampler_settings_are_reused_while_the_batch_is_the_same(self) -> None:
        """min_tokens and penalties must still follow the output."""
        logits, sampler = fixed_logits(1), SpySampler(VOCAB)
        only = state(SamplingParams(min_tokens=1, presence_penalty=1.0), stop_tokens_banned_until_min=[3])
        sampler.sample(logits.clone(), [only])
        assert bool(sampler.seen[0, 3].isinf())
        only.advance(8)
        sampler.sample(logits.clone(), [only])
        assert sampler.seen[0, 3] == logits[0, 3]
        assert sampler.seen[0, 8] == logits[0, 8] - 1.0


class TestUnsoundRows:
    @pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.5, top_k=5, min_p=0.1)])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_row_that_is_not_finite_fails_alone(self, params: SamplingParams, value: float) -> None:
        logits = fixed_logits(3)
        expected = [row.token_id for row in Sampler(VOCAB).sample(logits.clone(), [state(params)] * 3)]
        logits[1, 77] = value
        first, second, third = Sampler(VOCAB).sample(logits, [state(params)] * 3)
        assert [first.token_id, third.token_id] == [expected[0], expected[2]]
        assert str(second.error) == "the model's logits are not finite numbers"

    @pytest.mark.parametrize("logit", [1e35, 3e38, -1e35])
    def test_temperature_that_overflows_is_an_error_of_its_row_alone(self, logit: float) -> None:
        logits = torch.zeros(2, VOCAB)
        logits[0] = min(logit, 0.0)
        logits[0, 7] = logit
        states = [state(SamplingParams(temperature=2e-5)), state(SamplingParams(temperature=2e-5))]
        large, sound = Sampler(VOCAB).sample(logits, states)
        assert "too large" in str(large.error)
        assert sound.error is None

    def test_penalty_that_overflows_is_an_error(self) -> None:
        logits = torch.full((1, VOCAB), 3e38)
        params = SamplingParams(repetition_penalty=0.01)
        (only,) = Sampler(VOCAB).sample(logits, [state(params, prompt=[3])])
        assert "too large" in str(only.error)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_row_without_an_allowed_token_is_an_error(self, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, allowed_token_ids=[4], banned_token_ids=[4], top_p=0.9)
        (only,) = Sampler(VOCAB).sample(fixed_logits(1), [state(params)])
        assert str(only.error) == "no token is allowed here by the request's parameters"


# The number that is counted up makes the draw, before any distribution is asked for.
DISTRIBUTIONS: list[tuple[str, SamplingParams, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("seed", SamplingParams(), lambda logits: logits),
    ("position", SamplingParams(), lambda logits: logits),
    ("index", SamplingParams(), lambda logits: logits),
    ("seed", SamplingParams(temperature=0.5), lambda logits: hf.TemperatureLogitsWarper(0.5)(NO_IDS, logits)),
    ("position", SamplingParams(temperature=2.0), lambda logits: hf.TemperatureLogitsWarper(2.0)(NO_IDS, logits)),
    ("index", SamplingParams(top_k=5), lambda logits: hf.TopKLogitsWarper(5)(NO_IDS, logits)),
    ("seed", SamplingParams(top_p=0.8), lambda logits: hf.TopPLogitsWarper(0.8)(NO_IDS, logits)),
    ("position", SamplingParams(min_p=0.1), lambda logits: hf.MinPLogitsWarper(0.1)(NO_IDS, logits)),
]


class TestDraws:
    @pytest.mark.parametrize(("by", "params", "warp"), DISTRIBUTIONS)
    def test_draws_follow_the_distribution(
        self, by: str, params: SamplingParams, warp: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """20,000 draws over 32 tokens follow the distribution, as any number is counted up."""
        draws, vocab = 20_000, 32
        logits = fixed_logits(1, vocab, seed=5, scale=1.5)
        states = [
            SamplingState(
                params,
                seed=n if by == "seed" else 12345,
                position=n if by == "position" else 10,
                index=n if by == "index" else 0,
            )
            for n in range(draws)
        ]
        sampled = Sampler(vocab).sample(logits.expand(draws, vocab).clone(), states)
        observed = torch.bincount(torch.tensor([row.token_id for row in sampled]), minlength=vocab).double()
        expected = torch.softmax(warp(logits).double(), dim=-1)[0] * draws
        assert observed[expected == 0].sum() == 0

        # Tokens expected less than ten times are counted as one.
        rare = expected < 10
        bins = [(observed[~rare], expected[~rare])]
        if expected[rare].sum() >= 10:
            bins.append((observed[rare].sum()[None], expected[rare].sum()[None]))
        o, e = torch.cat([o for o, _ in bins]), torch.cat([e for _, e in bins])
        chi_square = ((o - e) ** 2 / e).sum().item()
        freedom = len(e) - 1
        # Wilson and Hilferty's approximation of the quantile at p = 0.0001.
        critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi_square < critical

    def test_sampled_row_does_not_depend_on_other_rows(self) -> None:
        every = [
            SamplingParams(seed=1),
            SamplingParams(temperature=0),
            SamplingParams(seed=2, top_k=7),
            SamplingParams(seed=3, top_p=0.9),
            SamplingParams(seed=4, temperature=1.5, min_p=0.02, repetition_penalty=1.2),
            SamplingParams(seed=5, top_k=90, top_p=0.5, logit_bias={3: 4.0}, logprobs=3),
            SamplingParams(seed=6, temperature=40.0, top_p=0.999),
            SamplingParams(seed=7, allowed_token_ids=[1, 2, 3], logprobs=0),
        ]
        logits = fixed_logits(len(every))
        states = [state(params, position=n, prompt=[1, 2], output=[3]) for n, params in enumerate(every)]
        together = Sampler(VOCAB).sample(logits.clone(), states)
        reverse = Sampler(VOCAB).sample(logits.flip(0), states[::-1])[::-1]
        alone = [Sampler(VOCAB).sample(logits[n : n + 1].clone(), [only])[0] for n, only in enumerate(states)]
        assert together == reverse == alone

    def test_completions_of_one_seed_draw_apart(self) -> None:
        logits = fixed_logits(1, scale=0.1).expand(16, VOCAB)
        states = [state(SamplingParams(seed=9), index=index) for index in range(16)]
        assert len({row.token_id for row in Sampler(VOCAB).sample(logits.clone(), states)}) > 8

    def test_large_batches_are_sampled_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = fixed_logits(10)
        states = [state(SamplingParams(seed=n, top_p=0.9)) for n in range(10)]
        whole = Sampler(VOCAB).sample(logits.clone(), states)
        monkeypatch.setattr("kernels.sampling_fallback._MAX_SORTED", 3 * VOCAB)
        assert Sampler(VOCAB).sample(logits.clone(), states) == whole


class TestLogprobs:
    def test_logprobs_are_those_before_temperature_and_filters(self) -> None:
        """Before temperature, penalties and filters."""
        logits = fixed_logits(3)
        expected = torch.log_softmax(logits, dim=-1)
        params = SamplingParams(logprobs=3, temperature=0.3, top_k=2, presence_penalty=2.0, banned_token_ids=[5])
        rows = Sampler(VOCAB).sample(
            logits.clone(), [state(params), state(SamplingParams()), state(SamplingParams(logprobs=0))]
        )
        first = rows[0].logprobs
        assert first is not None
        assert first.logprob == pytest.approx(expected[0, first.token_id].item())
        values, ids = expected[0].topk(3)
        assert first.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))
        assert rows[1].logprobs is None
        assert rows[2].logprobs is not None
        assert rows[2].logprobs.top == ()
        assert rows[2].logprobs.token_id == rows[2].token_id

    @pytest.mark.parametrize("num_tied", [2, 30, VOCAB])
    def test_greedy_token_leads_its_list_when_logits_tie(self, num_tied: int) -> None:
        """As they do in bfloat16."""
        logits = fixed_logits(4).clamp(max=2.0)
        tied = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:num_tied].sort().values
        logits[:, tied] = 5.0
        logits[3, tied[1]] = torch.nextafter(torch.tensor(5.0), torch.tensor(6.0))  # equal in log-probability alone
        states = [state(SamplingParams(temperature=0, logprobs=count)) for count in (1, 2, 20, 1)]
        for row in Sampler(VOCAB).sample(logits.clone(), states):
            assert row.logprobs is not None
            assert row.logprobs.top[0] == (row.token_id, row.logprobs.logprob)
        listed = Sampler(VOCAB).sample(logits.clone(), states)[2].logprobs
        assert listed is not None
        assert [token for token, _ in listed.top][:num_tied] == tied[:20].tolist()

    def test_score_gives_logprobs_of_given_tokens(self) -> None:
        logits = fixed_logits(4)
        scored = Sampler(VOCAB).score(logits, [9, 8, 7, 6], 2)
        expected = torch.log_softmax(logits, dim=-1)
        for row, token in enumerate([9, 8, 7, 6]):
            assert scored[row].token_id == token
            assert scored[row].logprob == pytest.approx(expected[row, token].item())
            assert [t for t, _ in scored[row].top] == expected[row].topk(2).indices.tolist()


class TestDrawing:
    """The quick ways to a token, against the definition: `filter_logits`, then the distribution summed in order."""

    VOCAB = 6007  # above every number of candidates, and not a multiple of a block

    @pytest.mark.parametrize("scale", [0.3, 2.0, 6.0], ids=["flat", "natural", "sharp"])
    @pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
    def test_every_sampling_path_gives_the_same_token(self, scale: float, ties: bool) -> None:
        rng = random.Random(7)
        rows = 400
        logits = fixed_logits(rows, self.VOCAB, seed=3, scale=scale)
        if ties:  # some hundred values, so that what is kept ends among equals
            logits = (logits * 20).round() / 20
        top_k = torch.tensor([rng.choice([1, 7, 63, 64, 65, 511, 2000, self.VOCAB, self.VOCAB]) for _ in range(rows)])
        top_p = torch.tensor([rng.choice([0.05, 0.5, 0.9, 0.99, 1.0, 1.0]) for _ in range(rows)])
        min_p = torch.tensor([rng.choice([0.0, 0.0, 0.01, 0.3]) for _ in range(rows)])
        filters = Filters(top_k=2000, top_p=True, min_p=True)
        where = {"seeds": torch.arange(rows), "positions": torch.full((rows,), 9), "indices": torch.zeros(rows).long()}

        def sampled(**options: bool) -> torch.Tensor:
            parameters = {"temperature": torch.ones(rows), "top_k": top_k, "top_p": top_p, "min_p": min_p}
            return sample_fallback(logits.clone(), filters=filters, **parameters, **where, **options)  # type: ignore[arg-type]

        kept = torch.softmax(filter_logits(logits.clone(), top_k, top_p, min_p, filters).double(), dim=-1)
        draws = uniform(**where)[:, None]
        expected = torch.searchsorted(kept.cumsum(-1), draws, right=True).squeeze(-1)
        assert torch.equal(sampled(), expected)
        assert torch.equal(sampled(is_static=True), expected)

    def test_sampler_sorts_only_rows_with_many_candidates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sorted_rows: list[int] = []
        monkeypatch.setattr(
            "kernels.sampling_fallback.filter_logits",
            lambda logits, *rest: sorted_rows.append(len(logits)) or filter_logits(logits, *rest),
        )
        logits = fixed_logits(8, self.VOCAB, scale=6.0)
        logits[5] = 0.0  # everything is as likely as everything
        Sampler(self.VOCAB).sample(logits, [state(SamplingParams(seed=n, top_p=0.9)) for n in range(8)])
        assert sorted_rows == [1]

    def test_extreme_draw_falls_on_a_kept_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The least and the greatest uniform number, with nothing kept at either end of the vocabulary."""
        logits = torch.full((2, 600), -100.0)
        logits[:, 270:290] = 0.0
        monkeypatch.setattr(
            "kernels.sampling_fallback.uniform", lambda *_: torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64)
        )
        for params in (SamplingParams(min_p=0.5), SamplingParams(top_k=20)):
            sampled = Sampler(600).sample(logits.clone(), [state(params), state(params)])
            assert [row.token_id for row in sampled] == [270, 289]


@pytest.mark.parametrize("is_static", [False, True])
def test_greedy_token_is_the_first_of_equals(is_static: bool) -> None:
    logits = fixed_logits(7)
    logits[2] = 1.0
    logits[3, [900, 17]] = 40.0
    logits[4] = float("-inf")
    tokens = argmax_fallback(logits, is_static=is_static)
    assert tokens.dtype is torch.int64
    assert tokens[:4].tolist() == [row.index(max(row)) for row in logits[:4].tolist()]
    assert tokens[2:5].tolist() == [0, 17, NONE_ALLOWED]
