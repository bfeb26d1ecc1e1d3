"""Steps that start before the last one's tokens are looked at, prompts among them, give what steps one by one give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.batch import Batch, MultiStepBatch, PendingTokens
from engine.errors import EngineFailed
from engine.execution.model_runner import ModelRunner
from engine.structured_outputs import StructuredOutputs
from engine.tokenization.tokenizer import Tokenizer
from tests.parity.comparing import greedy, ragged_prompts
from tests.parity.test_rope_scaling import LENGTHS, stretched
from tests.parity.tiny_models import NATIVE
from tests.unit.engine.execution.test_multi_step import PROMPTS, said
from tests.unit.engine.fake_engine import finish
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.tokenization.test_tokenizer import byte_level


class Watched(FakeRunner):
    """Notes what is started and what is read, and which steps the host had to run by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(supports_overlap=True, is_static=True, **options)
        self.moves: list[tuple[str, int]] = []
        self.num_started = 0
        self.mixed: list[Batch] = []
        self.num_alone = 0
        self._is_drawing = False

    def run(self, batch: Batch) -> Tensor:
        self.num_alone += not self._is_drawing
        return super().run(batch)

    def decode(self, batch: MultiStepBatch) -> PendingTokens:
        return self._started(super().decode(batch))

    def run_and_sample(self, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        self._is_drawing = True
        try:
            decoding = super().run_and_sample(batch, multi_step)
        finally:
            self._is_drawing = False
        self.mixed.append(batch)
        return self._started(decoding)

    def _started(self, decoding: PendingTokens) -> PendingTokens:
        number = self.num_started
        self.num_started += 1
        self.moves.append(("start", number))
        return _Noted(self.moves, number, decoding)


class _Noted:
    def __init__(self, moves: list[tuple[str, int]], number: int, decoding: PendingTokens) -> None:
        self._moves, self._number, self._decoding = moves, number, decoding

    def wait(self) -> np.ndarray:
        self._moves.append(("read", self._number))
        return self._decoding.wait()


def make(
    runner: FakeRunner, *, tokenizer: Tokenizer | None = None, tokens: int = 256, steps: int = 1, seqs: int = 32
) -> Engine:
    config = EngineConfig(
        block_size=runner.block_size, max_num_seqs=seqs, max_num_batched_tokens=tokens, decode_steps=steps
    )
    return Engine(runner, tokenizer, config)


def unseen(batch: Batch) -> int:
    return sum(token < 0 for entry in batch.entries for token in entry.token_ids)


@pytest.mark.parametrize("steps", [1, 4])
def test_next_step_starts_before_the_last_one_is_read(steps: int) -> None:
    """Requests come and go all the time, and long prompts in parts: still each step starts before the last is read."""
    runner = Watched(num_blocks=500, eos_token_ids=frozenset())
    engine = make(runner, tokens=8, steps=steps, seqs=4)
    prompts = {f"r{n:02}": [n + 1] * (3 + 5 * (n % 4)) for n in range(16)}
    lengths = {name: 3 + n % 7 for n, name in enumerate(prompts)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(temperature=0, max_tokens=lengths[name], ignore_eos=True))
    outputs = finish(engine)
    for name, prompt in prompts.items():
        assert outputs[name].token_ids == runner.greedy(prompt, lengths[name], ignore_eos=True)
    assert runner.num_alone == 0
    order = {move: place for place, move in enumerate(runner.moves)}
    late = [n for n in range(runner.num_started - 1) if order["start", n + 1] > order["read", n]]
    # Where all who run come to their ends in one step, there is nothing that could be started.
    assert len(late) <= 2
    assert sum(unseen(batch) > 0 and batch.num_tokens > unseen(batch) for batch in runner.mixed) > 10


def every_kind() -> list[tuple[list[int], SamplingParams]]:
    """What can be asked for, on prompts of which some begin alike."""
    stop = said(PROMPTS[0], 2, 4)
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop]),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(seed=1, max_tokens=9, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=11, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(seed=3, max_tokens=10, n=3, stop_token_ids=list(range(0, 300, 50))),
        SamplingParams(seed=4, max_tokens=14, min_tokens=7, stop_token_ids=list(range(0, 300, 50)), ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=0),
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    ]
    needing_host = [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2),
        SamplingParams(seed=7, max_tokens=8, presence_penalty=1.0, repetition_penalty=1.2),
        SamplingParams(seed=8, max_tokens=7, allowed_token_ids=list(range(40)), logit_bias={3: 2.0}),
        SamplingParams(seed=9, max_tokens=20, structured_outputs=StructuredOutputs(choice=["yes", "no", "perhaps"])),
        SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1),
    ]
    plain = [(PROMPTS[n] if n < 5 else PROMPTS[0] * 3 + [n], its) for n, its in enumerate([*params, *params])]
    return plain + [(PROMPTS[n] * 2, its) for n, its in enumerate(needing_host)] + plain


@pytest.mark.parametrize(
    ("steps", "tokens", "seqs", "num_blocks"),
    [
        pytest.param(1, 256, 8, 500, id="single"),
        pytest.param(4, 12, 8, 500, id="chunks"),
        pytest.param(1, 24, 12, 20, id="preemptions"),
    ],
)
def test_overlapped_outputs_equal_immediate_ones(steps: int, tokens: int, seqs: int, num_blocks: int) -> None:
    """Requests of every kind, which come while others run."""
    tokenizer = Tokenizer(byte_level())
    got = []
    for supports_overlap in (False, True):
        options = {"vocab_size": len(tokenizer.hf_tokenizer), "eos_token_ids": frozenset({1}), "num_blocks": num_blocks}
        runner = Watched(**options) if supports_overlap else FakeRunner(**options)
        engine = make(runner, tokenizer=tokenizer, steps=steps, tokens=tokens, seqs=seqs)
        outputs: dict[str, RequestOutput] = {}
        for number, (prompt, params) in enumerate(every_kind()):
            engine.add(f"r{number:02}", prompt, params)
            outputs |= {output.request_id: output for output in engine.step()}
            engine.check()
        outputs |= finish(engine)
        engine.close()
        assert engine.stats().kv_blocks_used == 0
        assert all(output.error is None for output in outputs.values())
        assert (engine.stats().preemptions > 0) == (num_blocks < 100)
        if isinstance(runner, Watched):
            assert sum(unseen(batch) > 0 for batch in runner.mixed) > 5
        got.append([(outputs[name].completions, outputs[name].prompt_logprobs) for name in sorted(outputs)])
    assert got[0] == got[1]


class TestStarts:
    """What happens to a step that was scheduled while another had not been looked at."""

    def with_steps_in_flight(self, runner: Watched, **options: Any) -> Engine:
        """Two requests, whose prompts are read and whose next step is started."""
        engine = make(runner, **options)
        for number in range(2):
            engine.add(f"r{number}", [number + 1] * 6, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        engine.step()
        engine.step()
        assert runner.moves == [("start", 0), ("start", 1), ("read", 0)]
        return engine

    def test_in_flight_step_is_read_before_a_step_that_needs_the_host(self) -> None:
        runner = Watched(num_blocks=100)
        engine = self.with_steps_in_flight(runner)
        engine.add("host", [1] * 6, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0))
        engine.step()
        assert runner.moves[-1] == ("read", 1)
        assert runner.num_alone == 1
        assert [len(entry.token_ids) for entry in runner.batches[-1].entries] == [1, 1, 2]
        outputs = finish(engine)
        for name, length, token in (("host", 3, 1), ("r0", 20, 1), ("r1", 20, 2)):
            assert outputs[name].token_ids == runner.greedy([token] * 6, length, ignore_eos=True)
        assert len(outputs["host"].logprobs or ()) == 3

    @pytest.mark.parametrize("steps", [1, 4])
    def test_prompt_that_raises_is_isolated_from_in_flight_sequences(
        self, steps: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And who shares its prefix, in the same step, is computed anew."""
        runner = Watched(num_blocks=100, raises_on=48)
        engine = self.with_steps_in_flight(runner, steps=steps)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        shared = [7, 8, 9, 10]
        engine.add("bad", [48, *shared], params)
        engine.add("same", [48, *shared], params)
        engine.add("good", shared * 2, params)
        outputs = finish(engine)
        assert "fake kernel failure" in caplog.text
        assert {name for name, output in outputs.items() if output.error} == {"bad", "same"}
        assert outputs["good"].token_ids == runner.greedy(shared * 2, 8, ignore_eos=True)
        for number in range(2):
            assert outputs[f"r{number}"].token_ids == runner.greedy([number + 1] * 6, 20, ignore_eos=True)

    def test_step_is_halved_when_it_cannot_start_for_lack_of_memory(self) -> None:
        runner = Watched(num_blocks=100)
        engine = self.with_steps_in_flight(runner)
        runner.max_tokens_at_once = 5
        for number in range(2, 6):
            engine.add(f"r{number}", [number + 1] * 6, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        outputs = finish(engine)
        assert runner.num_out_of_memory > 1
        for number in range(6):
            assert outputs[f"r{number}"].token_ids == runner.greedy([number + 1] * 6, 20, ignore_eos=True)

    def test_device_error_ends_the_engine(self) -> None:
        runner = Watched(num_blocks=100)
        engine = self.with_steps_in_flight(runner)
        engine.add("new", [5], SamplingParams(max_tokens=3))

        def lost(batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
            raise torch.AcceleratorError("an illegal memory access was encountered")

        runner.run_and_sample = lost  # type: ignore[method-assign]
        with pytest.raises(EngineFailed, match="illegal memory access"):
            engine.step()

    def test_sequences_do_not_read_blocks_that_a_failed_one_did_not_fill(self) -> None:
        """A completion reads its tokens anew, and a stranger's prompt is the same text, in a step that is not started
        before one is looked at in which the completion's sibling fails."""
        runner = Watched(num_blocks=100, eos_token_ids=frozenset())
        engine = make(runner)
        engine.add("pair", [1, 2], SamplingParams(seed=5, max_tokens=40, n=2, ignore_eos=True))
        for _ in range(12):
            engine.step()
        first, second = engine.scheduler.running
        runner.nan_on = next(token for token in first.token_ids if token not in second.token_ids)
        engine.step()
        text = list(second.token_ids)
        engine.scheduler.preempt(second)
        engine.scheduler.blocks.evict(range(runner.num_blocks))  # or it would find its own blocks again
        engine.add("stranger", [*text, 3], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0))
        (pair,) = engine.step()
        assert pair.error == "the model's logits are not finite numbers"
        assert runner.moves[-1] == ("read", runner.num_started - 1)
        assert engine.scheduler.running == []
        assert len(engine.scheduler.waiting) == 1
        outputs = finish(engine)
        assert outputs["stranger"].token_ids == runner.greedy([*text, 3], 6, ignore_eos=True)


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, MultiStepBatch]]:
    """Runners say that they overlap; returns the steps with prompts that are started."""
    started: list[tuple[Batch, MultiStepBatch]] = []
    run_and_sample = ModelRunner.run_and_sample

    def noted(self: ModelRunner, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        started.append((batch, multi_step))
        return run_and_sample(self, batch, multi_step)

    monkeypatch.setattr(ModelRunner, "supports_overlap", property(lambda self: True))
    monkeypatch.setattr(ModelRunner, "run_and_sample", noted)
    return started


REAL = [
    greedy(20, logprobs=None),
    SamplingParams(seed=1, max_tokens=17, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.8, top_p=0.8, top_k=20, max_tokens=13, n=2, ignore_eos=True),
    SamplingParams(seed=3, min_p=0.05, max_tokens=20, min_tokens=6, stop_token_ids=list(range(5, 900, 150))),
]


def served(directory: Path, *, deterministic: bool = False) -> list[list[Sequence[int]]]:
    """Tokens of prompts that are read in parts, and while others are decoded."""
    engine = Engine.from_pretrained(
        directory,
        EngineConfig(
            device="cpu",
            dtype="float32",
            num_kv_blocks=64,
            block_size=8,
            max_num_batched_tokens=24,
            max_num_seqs=6,
            decode_steps=2,
            deterministic=deterministic,
        ),
    )
    prompts = ragged_prompts(lengths=(1, 30, 41))
    outputs = engine.generate(prompts, [REAL[n % 4] for n in range(len(prompts))])
    assert all(output.error is None for output in outputs)
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_overlap_gives_the_same_tokens_with_real_models(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    next(model for model in NATIVE if model.name == name).save(tmp_path, torch.float32)
    expected = served(tmp_path)
    started = request.getfixturevalue("overlapping")
    assert served(tmp_path) == expected
    assert sum(unseen(batch) > 0 for batch, _ in started) > 4


def test_overlap_gives_the_same_tokens_when_the_rope_scale_changes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A sequence is computed anew when its length says so, while its next step is under way."""
    stretched("longrope").save(tmp_path)
    prompts = ragged_prompts(lengths=LENGTHS[:3])[::2]
    config = EngineConfig(device="cpu", num_kv_blocks=256, max_num_batched_tokens=32)
    tokens = []
    for supports_overlap in (False, True):
        if supports_overlap:
            started = request.getfixturevalue("overlapping")
        engine = Engine.from_pretrained(tmp_path, config)
        tokens.append([output.token_ids for output in engine.generate(prompts, greedy(12, logprobs=None))])
        assert engine.stats().preemptions > 0
    assert tokens[0] == tokens[1]
    assert any(unseen(batch) for batch, _ in started)


def test_deterministic_engine_does_not_overlap(tmp_path: Path, overlapping: list[tuple[Batch, MultiStepBatch]]) -> None:
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    engine = Engine.from_pretrained(
        tmp_path, EngineConfig(device="cpu", dtype="float32", num_kv_blocks=32, block_size=16, deterministic=True)
    )
    engine.generate([[3, 4, 5]], greedy(4, logprobs=None))
    assert overlapping == []
