"""What rank 0 tells the other ranks: the calls of their runners, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.batch import Batch, MultiStepBatch
from engine.config import EngineConfig
from engine.execution.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Start:
    """A rank's first message: what it is."""

    path: Path
    config: EngineConfig
    rank: int
    rendezvous: Path
    threads: int
    """That it may compute with, on the CPU."""

    log_level: int


@dataclass(frozen=True, slots=True)
class Run:
    batch: Batch

    def on(self, runner: ModelRunner) -> None:
        runner.run(self.batch)


@dataclass(frozen=True, slots=True)
class Decode:
    batch: MultiStepBatch

    def on(self, runner: ModelRunner) -> None:
        runner.decode(self.batch)


@dataclass(frozen=True, slots=True)
class RunAndSample:
    batch: Batch
    multi_step: MultiStepBatch

    def on(self, runner: ModelRunner) -> None:
        runner.run_and_sample(self.batch, self.multi_step)


Message = Run | Decode | RunAndSample
