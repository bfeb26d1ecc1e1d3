"""Random walks over everything that can happen to an engine, audited after each move.

In any order of adds, steps, aborts and preemptions, each request's tokens are those of a run by itself.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.engine import _seed
from tests.unit.engine.fake_runner import FakeRunner

RAISES, NAN = 48, 49
MAX_LEN = 40

# Few distinct tokens, so that prefixes meet; now and then one that makes the model fail.
TOKENS = st.sampled_from([1, 1, 1, 2])
PROMPTS = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=24),
    st.tuples(st.lists(TOKENS, max_size=6), st.sampled_from([RAISES, NAN])).map(lambda t: [*t[0], t[1]]),
)
PARAMS = st.builds(
    lambda lengths, **others: SamplingParams(max_tokens=lengths[0], min_tokens=lengths[1], **others),
    lengths=st.sampled_from([(0, 0), (1, 0), (5, 0), (5, 3), (16, 0), (16, 3), (None, 0)]),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    seed=st.sampled_from([None, 3]),
    n=st.sampled_from([1, 1, 3]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    top_p=st.sampled_from([1.0, 0.8]),
    stop_token_ids=st.sampled_from([(), (), (3, 7)]),
    logprobs=st.sampled_from([None, None, 1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    ignore_eos=st.booleans(),
)


def runner(
    num_blocks: int,
    block_size: int,
    *,
    is_static: bool = False,
    supports_overlap: bool = False,
    memory: int | None = None,
) -> FakeRunner:
    return FakeRunner(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=MAX_LEN,
        raises_on=RAISES,
        nan_on=NAN,
        is_static=is_static,
        supports_overlap=supports_overlap,
        max_tokens_at_once=memory,
    )


class EngineMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        block_size=st.sampled_from([1, 4, 16]),
        blocks=st.integers(0, 8),
        seqs=st.sampled_from([1, 3, 8]),
        tokens=st.sampled_from([2, 8, 64]),
        caching=st.booleans(),
        decode_steps=st.sampled_from([None, 1, 2, 8]),
        is_static=st.booleans(),
        supports_overlap=st.booleans(),
        memory=st.sampled_from([None, None, 3]),
    )
    def make(
        self,
        block_size: int,
        blocks: int,
        seqs: int,
        tokens: int,
        caching: bool,
        decode_steps: int | None,
        is_static: bool,
        supports_overlap: bool,
        memory: int | None,
    ) -> None:
        # At least as many blocks as the longest request needs, seldom enough for all.
        num_blocks = -(-MAX_LEN // block_size) + blocks
        config = EngineConfig(
            block_size=block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            enable_prefix_caching=caching,
            decode_steps=decode_steps,
        )
        made = runner(num_blocks, block_size, is_static=is_static, supports_overlap=supports_overlap, memory=memory)
        self.engine = Engine(made, None, config)
        self.given: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self.aborted: set[str] = set()
        self.outputs: dict[str, RequestOutput] = {}

    @rule(target=requests, prompt=PROMPTS, params=PARAMS, priority=st.integers(0, 2), salt=st.sampled_from(["", "b"]))
    def add(self, prompt: list[int], params: SamplingParams, priority: int, salt: str) -> str:
        request_id = f"r{len(self.given)}"
        self.engine.add(request_id, prompt, params, priority=priority, cache_salt=salt)
        self.given[request_id] = (tuple(prompt), params)
        return request_id

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                assert output.request_id not in self.outputs
                self.outputs[output.request_id] = output
            self.engine.check()

    @rule(request_id=consumes(requests))
    def abort(self, request_id: str) -> None:
        if request_id not in self.outputs:
            self.aborted.add(request_id)
        self.engine.abort(request_id)
        self.engine.abort(request_id)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        running = self.engine.scheduler.running
        if running:
            self.engine.scheduler.preempt(running[data.draw(st.integers(0, len(running) - 1))])

    @invariant()
    def audit(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            assert self.engine.num_requests_wanted() >= 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_unfinished:
            self.step(1)
            steps += 1
            assert steps < 5000, "the engine makes no progress"
        assert self.outputs.keys() == self.given.keys()
        assert self.engine.stats().kv_blocks_used == 0
        for request_id, output in self.outputs.items():
            prompt, params = self.given[request_id]
            alone = run_alone(request_id, prompt, repr(params))
            got = [list(completion.token_ids) for completion in output.completions]
            want = [list(completion.token_ids) for completion in alone.completions]
            if request_id in self.aborted:
                assert output.finish_reason in ("abort", "error")
                assert all(full[: len(part)] == part for part, full in zip(got, want, strict=True))
                continue
            assert output.finish_reason == alone.finish_reason
            if RAISES in prompt or NAN in prompt:
                # Without a token or a log-probability to give, NaN logits are never looked at.
                unread = RAISES not in prompt and params.max_tokens == 0
                assert unread or output.finish_reason == "error"
                continue
            assert got == want
            assert output.prompt_logprobs == alone.prompt_logprobs
            if params.greedy and not (params.penalized or params.stop_token_ids or params.min_tokens):
                reference = runner(1, 1).greedy(prompt, alone_limit(prompt, params), ignore_eos=params.ignore_eos)
                assert got == [reference] * params.n


def alone_limit(prompt: tuple[int, ...], params: SamplingParams) -> int:
    return MAX_LEN - len(prompt) if params.max_tokens is None else params.max_tokens


@cache
def run_alone(request_id: str, prompt: tuple[int, ...], params: str) -> RequestOutput:
    """The request by itself, with room for everything and nothing shared."""
    config = EngineConfig(
        block_size=1, max_num_seqs=8, max_num_batched_tokens=512, enable_prefix_caching=False, decode_steps=1
    )
    engine = Engine(runner(512, 1), None, config)
    engine.add(request_id, prompt, eval(params, {"SamplingParams": SamplingParams}))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs[0]


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_engine_keeps_its_invariants_over_long_random_walks(part: int) -> None:
    """The same with fresh randomness and thousands of moves, in parts that each have time to spare."""
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_seed_is_stable_across_processes() -> None:
    """A resumed request draws as it would have: its seed comes from its id, not from Python's salted hash."""
    assert _seed(0, "batch_req_1") == 0x1D1989444B7C0A64
