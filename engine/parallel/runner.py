"""A model that several ranks share, as one runner to the engine.

    rank 0   engine ── TensorParallelRunner ── ModelRunner ─┐  sums in every layer, logits,
                         │ each call, as a message          ├  and rank 0's tokens
    rank i   serve ──────┴──────────────────── ModelRunner ─┘

Ranks are told what to run, not what came of it: each keeps its own heads' part of the KV cache and its own copy of the
decode state, and all change them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch import Batch, MultiStepBatch, PendingTokens
from engine.config import EngineConfig
from engine.errors import EngineFailed, ModelError
from engine.execution.model_runner import ModelRunner, device_of
from engine.loading.hub import resolve_model
from engine.parallel.messages import Decode, Message, Run, RunAndSample
from engine.parallel.processes import RankEnded, RankProcesses


class OtherRanks(Protocol):
    """All ranks but the first, as the first sees them."""

    def send(self, message: Message) -> None:
        """Have every rank do it, after what it was sent before. Raises `RankEnded`."""

    def check(self) -> None:
        """Raise `RankEnded`, with the reason where one is known, if a rank has ended."""

    def close(self) -> None:
        """End them."""


class TensorParallelRunner:
    """Rank 0's runner and the other ranks; implements `Runner`.

    Where one rank raises, others may be waiting for it in the middle of a layer. So any error is `EngineFailed`.
    """

    def __init__(self, local: ModelRunner, ranks: OtherRanks) -> None:
        self.local = local
        """Rank 0's own."""

        self._ranks = ranks

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, config: EngineConfig) -> TensorParallelRunner:
        """Start the other ranks and load a part of the model on each; raises `ModelError`."""
        path = resolve_model(path_or_id)
        ranks = RankProcesses(path, config, device_of(config))
        try:
            try:
                return cls(ModelRunner.from_pretrained(path, config, ranks.connect()), ranks)
            except ModelError:
                raise
            except Exception as error:
                ranks.check()  # another rank's reason, where that is why
                raise error
        except BaseException as error:
            ranks.close()
            if isinstance(error, RankEnded):
                raise ModelError(str(error)) from error
            raise

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def num_blocks(self) -> int:
        return self.local.num_blocks

    @property
    def vocab_size(self) -> int:
        return self.local.vocab_size

    @property
    def max_model_len(self) -> int:
        return self.local.max_model_len

    @property
    def supports_overlap(self) -> bool:
        """See `Runner.supports_overlap`."""
        return self.local.supports_overlap

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.local.eos_token_ids

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        """See `Runner.rope_length`."""
        return self.local.rope_length(num_prompt, num_tokens)

    def run(self, batch: Batch) -> Tensor:
        """See `Runner.run`."""
        with self._errors_as_engine_failed():
            self._ranks.send(Run(batch))
            return self.local.run(batch)

    def decode(self, batch: MultiStepBatch) -> PendingTokens:
        """See `Runner.decode`."""
        with self._errors_as_engine_failed():
            self._ranks.send(Decode(batch))
            return _CheckedTokens(self.local.decode(batch), self._wait)

    def run_and_sample(self, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        """See `Runner.run_and_sample`."""
        with self._errors_as_engine_failed():
            self._ranks.send(RunAndSample(batch, multi_step))
            return _CheckedTokens(self.local.run_and_sample(batch, multi_step), self._wait)

    def raise_if_broken(self) -> None:
        """See `Runner.raise_if_broken`."""
        with self._errors_as_engine_failed():
            self._ranks.check()

    def close(self) -> None:
        """See `Runner.close`."""
        self._ranks.close()

    def _wait(self, tokens: PendingTokens) -> npt.NDArray[np.int64]:
        with self._errors_as_engine_failed():
            result = tokens.wait()
            # Where a rank has ended, work on this device was broken off and left no tokens.
            self._ranks.check()
            return result

    @contextmanager
    def _errors_as_engine_failed(self) -> Iterator[None]:
        try:
            yield
        except EngineFailed:
            raise
        except RankEnded as error:
            raise EngineFailed(str(error)) from error
        except Exception as error:
            try:
                self._ranks.check()
            except RankEnded as reason:
                raise EngineFailed(str(reason)) from error
            raise EngineFailed(f"rank 0 of a model that ranks share cannot go on: {error}") from error


@dataclass(frozen=True, slots=True)
class _CheckedTokens:
    tokens: PendingTokens
    check: Callable[[PendingTokens], npt.NDArray[np.int64]]

    def wait(self) -> npt.NDArray[np.int64]:
        return self.check(self.tokens)
