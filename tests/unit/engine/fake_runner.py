"""A model that is a function of the token history, over a KV cache that is really paged.

Each slot of the cache holds the token that was written there. A history is read back through the block table, so that
a wrong table, a block reused too early or a wrongly shared prefix changes what comes out. Multi-step batches go through
the engine's own state and decode loop; only the model and its cache are made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.attention import DecodeMetadata
from engine.batch import Batch, BatchEntry, MultiStepBatch, PendingTokens
from engine.device.cuda_graphs import EagerRunner
from engine.execution.decode_state import DecodeState
from engine.execution.multi_step import MultiStepDecoder
from engine.models.decoder import TokenInputs

_STATES = 1009
_BATCH_SLOTS = 1024


class FakeRunner:
    """`logits_after(history)` is the whole model; the rest is the cache."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 50,
        max_model_len: int = 128,
        eos_token_ids: frozenset[int] = frozenset({0}),
        raises_on: int | None = None,
        nan_on: int | None = None,
        max_tokens_at_once: int | None = None,
        is_static: bool = False,
        supports_overlap: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.supports_overlap = supports_overlap
        self.raises_on = raises_on
        """A token that makes a step raise which has it among its new ones."""
        self.nan_on = nan_on
        """A token after which, anywhere in the history, logits are NaN."""
        self.max_tokens_at_once = max_tokens_at_once
        """A larger batch runs out of memory."""
        self.batches: list[Batch] = []
        self.multi_step_batches: list[MultiStepBatch] = []
        self.num_out_of_memory = 0
        self._cache = [[-1] * block_size for _ in range(num_blocks + 1)]
        self._state = DecodeState(_BATCH_SLOTS, num_blocks, vocab_size, torch.device("cpu"))
        self._decoder = MultiStepDecoder(
            self._forward,
            self._state,
            EagerRunner(),
            block_size=block_size,
            padding_block=num_blocks,
            max_steps=64,
            is_static=is_static,
        )
        generator = torch.Generator().manual_seed(7)
        self._table = torch.randn(_STATES, vocab_size, generator=generator) * 3
        for token in (raises_on, nan_on):
            if token is not None:
                self._table[:, token] = -1e4  # only prompts bring it in

    def logits_after(self, history: Sequence[int]) -> torch.Tensor:
        if self.nan_on is not None and self.nan_on in history:
            return torch.full((self.vocab_size,), float("nan"))
        state = 1
        for token in history:
            state = (state * 31 + token * 7 + 3) % _STATES
        return self._table[state]

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        return 0

    def run(self, batch: Batch) -> torch.Tensor:
        self.batches.append(batch)
        self._need_memory(batch.num_tokens)
        for entry in batch.entries:
            assert len(entry.token_ids) > 0
            if self.raises_on in entry.token_ids:
                raise RuntimeError("fake kernel failure")
            for offset, token in enumerate(entry.token_ids):
                block, slot = self._slot(entry, entry.start + offset)
                self._cache[block][slot] = token
        rows = [torch.zeros(0, self.vocab_size)]
        for entry in batch.entries:
            end = entry.start + len(entry.token_ids)
            history = []
            for position in range(end):
                block, slot = self._slot(entry, position)
                history.append(self._cache[block][slot])
            rows += [self.logits_after(history[: p + 1])[None] for p in range(end - entry.num_logits, end)]
        return torch.cat(rows)

    def decode(self, batch: MultiStepBatch) -> PendingTokens:
        self.multi_step_batches.append(batch)
        return self._decoder.decode(batch)

    def run_and_sample(self, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        def known(entry: BatchEntry) -> BatchEntry:
            return replace(entry, token_ids=self._state.tokens(torch.tensor(entry.token_ids)).tolist())

        return self._decoder.sample(multi_step, lambda: self.run(Batch([known(entry) for entry in batch.entries])))

    def raise_if_broken(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _forward(self, inputs: TokenInputs, layout: DecodeMetadata) -> torch.Tensor:
        self._need_memory(len(layout.slots))
        tokens = inputs.token_ids.tolist()
        if self.raises_on in tokens:
            raise RuntimeError("fake kernel failure")
        for token, slot in zip(tokens, layout.slots.tolist(), strict=True):
            self._cache[slot // self.block_size][slot % self.block_size] = token
        return torch.stack(
            [
                self.logits_after(
                    [self._cache[table[p // self.block_size]][p % self.block_size] for p in range(last + 1)]
                )
                for last, table in zip(layout.positions.tolist(), layout.block_tables.tolist(), strict=True)
            ]
        )

    def _need_memory(self, num_tokens: int) -> None:
        if self.max_tokens_at_once is not None and num_tokens > self.max_tokens_at_once:
            self.num_out_of_memory += 1
            raise torch.OutOfMemoryError("fake memory is full")

    def _slot(self, entry: BatchEntry, position: int) -> tuple[int, int]:
        return entry.block_table[position // self.block_size], position % self.block_size

    def greedy(self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        """What greedy decoding must give."""
        history = list(prompt)
        while len(history) < len(prompt) + max_tokens:
            history.append(int(self.logits_after(history).argmax()))
            if history[-1] in self.eos_token_ids and not ignore_eos:
                break
        return history[len(prompt) :]
