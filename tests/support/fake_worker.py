"""A real worker process around a fake model: `python -m tests.support.fake_worker`.

Everything is the product's own but the runner, which is a function of the token history. How slow it is, and which
prompts kill, hang or break it, is decided here. With `FAKE_STEP_GATE` its engine steps only while the file of that name
exists. With `FAKE_LOAD_GATE` it serves two models in turn, of which the second loads only while that file exists.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cli import logs
from engine import Engine, EngineConfig
from engine.batch import Batch
from jobs.settings import Settings
from tests.unit.engine.fake_runner import FakeRunner
from worker.generation.engine_roster import ServedModel
from worker.generation.engine_thread import EngineThread
from worker.generation.service import run_worker

MODEL = "fake"
OTHER_MODEL = "other"
VOCAB_SIZE = 50
MAX_MODEL_LEN = 128
POISON = 49  # a prompt with this token kills the process, as a bad kernel would
HANG = 48  # one with this token hangs in a step for good
BREAK = 47  # one with this token breaks the runner for all


class Runner(FakeRunner):
    """The fake model, at a speed that leaves time to interfere."""

    def __init__(self, step_seconds: float, *, is_other: bool = False) -> None:
        super().__init__(num_blocks=1024, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
        if is_other:
            self._table = self._table.flip(0)
        self._table[:, [POISON, HANG, BREAK]] = -1e4  # only prompts bring them in
        self._step_seconds = step_seconds
        self._is_broken = False

    def run(self, batch: Batch) -> torch.Tensor:
        await_gate("FAKE_STEP_GATE")
        time.sleep(self._step_seconds)
        tokens = {token for entry in batch.entries for token in entry.token_ids}
        if POISON in tokens:
            ctypes.string_at(0)  # a real SIGSEGV
        if HANG in tokens:
            time.sleep(3600)
        self._is_broken |= BREAK in tokens
        if self._is_broken:
            raise RuntimeError("the fake device is gone")
        return super().run(batch)


def load() -> Engine:
    engine = engine_of(Runner(float(os.environ.get("FAKE_STEP_SECONDS", "0"))))
    if "FAKE_HANGING_TOKENIZER" in os.environ:
        engine.tokenizer = HangingTokenizer()  # type: ignore[assignment]
    return engine


def load_other() -> Engine:
    await_gate("FAKE_LOAD_GATE")
    return engine_of(Runner(0, is_other=True))


def await_gate(name: str) -> None:
    gate = os.environ.get(name)
    while gate is not None and not Path(gate).exists():
        time.sleep(0.01)


def engine_of(runner: Runner) -> Engine:
    return Engine(runner, None, EngineConfig(block_size=4, max_num_seqs=64, max_num_batched_tokens=512))


class HangingTokenizer:
    """A byte a token, but for the text "hang", at which it stands still without running any Python."""

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if "hang" in texts:
            time.sleep(3600)
        return [[byte % 40 for byte in text.encode()] for text in texts]

    def render_chat(self, messages: object) -> str:
        return "hang"

    def least_tokens(self, text: str) -> int:
        return 0


def break_submit(message: str) -> None:
    """A slip of ours on the claim loop's thread, after a claim was committed."""

    def submit(self: EngineThread, requests: object) -> None:
        raise KeyError(message)

    EngineThread.submit = submit  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    logs.configure("info")
    if "FAKE_BROKEN_SUBMIT" in os.environ:
        break_submit(os.environ["FAKE_BROKEN_SUBMIT"])
    models = [ServedModel(MODEL, load)]
    if "FAKE_LOAD_GATE" in os.environ:
        models.append(ServedModel(OTHER_MODEL, load_other))
    sys.exit(run_worker(Settings(), models, device="cpu"))
