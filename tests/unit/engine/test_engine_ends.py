"""Where an output ends: end tokens, stop tokens, stop strings, lengths; and what its text shows of that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine import SamplingParams
from tests.unit.engine.fake_engine import GREEDY, make, speaking
from tests.unit.engine.fake_runner import FakeRunner


class TestEnds:
    def reference(self, runner: FakeRunner, prompt: list[int]) -> list[int]:
        return runner.greedy(prompt, 30, ignore_eos=True)

    def test_end_of_sequence_is_kept_among_the_tokens(self) -> None:
        runner = FakeRunner()
        tokens = self.reference(runner, [3])
        runner.eos_token_ids = frozenset({tokens[4]})
        expected = tokens[: tokens.index(tokens[4]) + 1]
        (output,) = make(runner).generate([[3]], SamplingParams(temperature=0, max_tokens=30))
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (expected, "stop", None)

    def test_stop_token_ends_the_output(self) -> None:
        runner = FakeRunner()
        tokens = self.reference(runner, [3])
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[tokens[4]])
        (output,) = make(runner).generate([[3]], params)
        assert output.token_ids == tokens[: tokens.index(tokens[4]) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", tokens[4])

    def test_stop_tokens_are_banned_before_min_tokens(self) -> None:
        runner = FakeRunner()
        tokens = self.reference(runner, [3])
        params = SamplingParams(
            temperature=0, max_tokens=30, min_tokens=8, ignore_eos=True, stop_token_ids=[tokens[0], tokens[2]]
        )
        (output,) = make(runner).generate([[3]], params)
        assert len(output.token_ids) > 8
        assert not {tokens[0], tokens[2]} & set(output.token_ids[:8])

    def test_max_tokens_of_zero_only_scores_the_prompt(self) -> None:
        (output,) = make().generate([[3, 4, 5]], SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert (output.token_ids, output.finish_reason) == ([], "length")
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 3

    def test_output_ends_at_the_context_length(self) -> None:
        (output,) = make(FakeRunner(max_model_len=20)).generate(
            [[3, 4]], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        )
        assert (len(output.token_ids), output.finish_reason) == (18, "length")

    def test_stop_string_across_tokens_is_cut(self) -> None:
        engine, runner, tokenizer = speaking()
        tokens = runner.greedy(tokenizer.encode("the fox"), 30, ignore_eos=True)
        whole = tokenizer.decode(tokens)
        place = len(tokenizer.decode(tokens[:9]))
        stop = whole[place - 2 : place + 2]  # the end of one token and the beginning of the next
        first = whole.index(stop)
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=[stop, "never said"])
        (output,) = engine.generate(["the fox"], params)
        assert (output.text, output.finish_reason, output.stop_reason) == (whole[:first], "stop", stop)
        assert len(output.token_ids) < 30
        assert stop in tokenizer.decode(output.token_ids)

        params = SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, stop=stop, include_stop_str_in_output=True
        )
        (output,) = engine.generate(["the fox"], params)
        assert output.text == whole[: first + len(stop)]

    @pytest.mark.parametrize("decode_steps", [1, 8])
    @pytest.mark.parametrize("stop", ["<unk>", "unk", "x<unk>"])
    def test_stop_string_of_a_special_token_ends_the_output(self, stop: str, decode_steps: int) -> None:
        """The text leaves the token out; it is no end of sequence."""
        engine, runner, tokenizer = speaking(decode_steps=decode_steps)
        (x,), (special,) = (tokenizer.encode(text, add_special_tokens=False) for text in ("x", "<unk>"))
        assert special not in runner.eos_token_ids
        prompt = tokenizer.encode("fox")
        says = [*[x] * 5, special, *[x] * 20]
        logits_after = FakeRunner.logits_after

        def scripted(history: Sequence[int]) -> torch.Tensor:
            token = says[min(len(history) - len(prompt), 25)]
            return logits_after(runner, history).index_fill(0, torch.tensor(token), 1e3)

        runner.logits_after = scripted  # type: ignore[method-assign]
        params = SamplingParams(temperature=0, max_tokens=20, stop=[stop])
        (output,) = engine.generate([prompt], params)
        assert output.token_ids == [*[x] * 5, special]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == "x" * (4 if stop.startswith("x") else 5)

    def test_stop_token_is_not_in_the_text(self) -> None:
        engine, runner, tokenizer = speaking()
        tokens = runner.greedy(tokenizer.encode("fox"), 30, ignore_eos=True)
        end = tokens.index(tokens[6])
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[tokens[6]])
        (output,) = engine.generate(["fox"], params)
        assert output.token_ids == tokens[: end + 1]
        assert output.text == tokenizer.decode(tokens[:end])

    def test_echo_puts_the_prompt_before_the_text(self) -> None:
        engine, _, tokenizer = speaking()
        plain, echoed = engine.generate(
            ["the fox"] * 2, [GREEDY, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, echo=True)]
        )
        assert echoed.text == tokenizer.decode([*plain.prompt_token_ids, *plain.token_ids])
        assert echoed.text.startswith("the fox")
        assert echoed.token_ids == plain.token_ids

    def test_stop_string_cuts_the_output_after_an_echoed_prompt(self) -> None:
        engine, _, _ = speaking()
        (plain,) = engine.generate(["the fox"], GREEDY)
        stop = plain.text[4:6]
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, echo=True, stop=stop)
        (echoed,) = engine.generate(["the fox"], params)
        assert echoed.text == "the fox" + plain.text[: plain.text.index(stop)]
