"""An engine over the fake runner, with or without a real tokenizer."""

from __future__ import annotations

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.tokenization.tokenizer import Tokenizer
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.tokenization.test_tokenizer import byte_level

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def make(runner: FakeRunner | None = None, tokenizer: Tokenizer | None = None, **settings: object) -> Engine:
    runner = runner or FakeRunner()
    values = {"block_size": runner.block_size, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
    return Engine(runner, tokenizer, EngineConfig(**values))  # type: ignore[arg-type]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
    return outputs


def speaking(**settings: object) -> tuple[Engine, FakeRunner, Tokenizer]:
    """An engine with a real tokenizer, whose model says anything in its vocabulary."""
    tokenizer = Tokenizer(byte_level())
    runner = FakeRunner(vocab_size=len(tokenizer.hf_tokenizer), eos_token_ids=frozenset({1}))
    return make(runner, tokenizer, **settings), runner, tokenizer
