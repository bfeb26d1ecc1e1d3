"""Runs batches through a model over a paged KV cache: the torch side of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.attention import CapturableAttention, DecodeMetadata, make_backend
from engine.attention.kv_cache import KVCache, cache_dtype
from engine.batch import Batch, MultiStepBatch, PendingTokens
from engine.config import EngineConfig
from engine.device.agreed_capture import AgreedCapture
from engine.device.collectives import ALONE, Group
from engine.device.cuda_graphs import Capture, CapturedRunner, CudaCapture, EagerRunner, GraphRunner, batch_size
from engine.device.threads import Threads
from engine.errors import ModelError, UnsupportedModel
from engine.execution.batch_invariance import check_invariance
from engine.execution.decode_state import DecodeState, padding_rows
from engine.execution.fixed_passes import pad_pass, split_into_passes
from engine.execution.inputs import prepare_inputs
from engine.execution.memory_budget import (
    HOST_SAMPLED_ROWS,
    choose_num_blocks,
    graph_bytes,
    largest_decode,
    largest_step,
    state_bytes,
    step_bytes,
)
from engine.execution.multi_step import MultiStepDecoder, most_demanding_mode, sample_tokens
from engine.linears import prepare_linears
from engine.loading.hub import eos_token_ids, load_config, resolve_model
from engine.loading.packed_model import load_packed_model
from engine.models.decoder import Decoder, TokenInputs
from engine.models.generic import GenericDecoder, verify
from engine.sampling.sampler import Sampler
from engine.sampling.state import SamplingState
from engine.sampling_params import SamplingParams
from engine.scheduling.decode_steps import MOST_STEPS
from kernels.integers import ceil_div
from kernels.prefix_groups import LEAST_SHARED


class ModelRunner:
    """A model, its KV cache and its attention; implements `Runner`."""

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        threads: Threads | None = None,
        group: Group = ALONE,
    ) -> None:
        """Take a loaded model over and allocate its KV cache; raises `ModelError` when context or memory do not fit.

        The model's linear layers are replaced by faster ones, or for deterministic ones, where they were not already;
        `threads` are those which they were replaced with. A model that a `group` of ranks shares has a runner on each,
        and all of them are made and called alike.
        """
        self.model = model
        self._group = group
        self.eos_token_ids = eos_token_ids
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kv_dtype = cache_dtype(config, self.dtype)
        self.max_model_len = _max_model_len(model, config)
        self._is_deterministic = config.deterministic
        self._threads = threads or Threads()
        self._graph_bytes = 0
        if config.deterministic:
            _check_deterministic(model, self.device)
        prepare_linears(model, config, self.device, self._threads)
        self.backend = make_backend(config, self.device, self._threads)
        if isinstance(model, GenericDecoder):
            verify(model, self._on_trial(config.block_size), config.block_size)
        if config.deterministic:
            check_invariance(
                self._on_trial(config.block_size),
                vocab_size=self.vocab_size,
                max_positions=self.max_model_len,
                block_size=config.block_size,
            )
        if isinstance(self.backend, CapturableAttention):
            # Before the memory that is left is measured.
            self.backend.reserve(
                model.attention_layers, kv_dtype=self.kv_dtype, max_sequences=batch_size(_max_batch_slots(config))
            )
        num_blocks = group.minimum(
            choose_num_blocks(
                config,
                model.attention_layers,
                max_model_len=self.max_model_len,
                dtype=self.kv_dtype,
                device=self.device,
                reserved_bytes=self._reserved_bytes(config) if self.device.type == "cuda" else 0,
            )
        )
        takes_memory = config.cpu_kv_cache_bytes is not None
        self.cache = self._cache(num_blocks, config.block_size, self.kv_dtype, takes_memory=takes_memory)
        max_blocks = min(ceil_div(self.max_model_len, config.block_size), num_blocks)
        self._state = DecodeState(_max_batch_slots(config), max_blocks, self.vocab_size, self.device)
        self._decoder = MultiStepDecoder(
            self._forward,
            self._state,
            self._graphs(),
            block_size=config.block_size,
            padding_block=self.cache.padding_block,
            max_steps=_max_steps(config),
            is_static=self.device.type == "cuda",
            group=group,
            prefix_blocks=ceil_div(LEAST_SHARED, config.block_size) if config.shared_prefix_attention else None,
        )
        self._decoder.capture()

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, config: EngineConfig, group: Group = ALONE) -> ModelRunner:
        """Load from a directory, a GGUF file or a hub id, of a shared model the part of its rank; raises
        `ModelError`."""
        path = resolve_model(path_or_id)
        model_config = load_config(path)
        device, threads = device_of(config, group.rank), Threads()
        model = load_packed_model(path, model_config, config, device=device, threads=threads, group=group)
        # A rank that could not load is noticed here, before any waits for it on the device.
        group.minimum(0)
        eos = eos_token_ids(path, model_config, model.vocab_size)
        return cls(model, config, eos_token_ids=eos, threads=threads, group=group)

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @property
    def supports_overlap(self) -> bool:
        """See `Runner.supports_overlap`."""
        return self.device.type == "cuda"

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        """See `Runner.rope_length`."""
        return self.model.rope_length(num_prompt, num_tokens)

    def run(self, batch: Batch) -> Tensor:
        """See `Runner.run`."""
        with self._tidying():
            return self._run(batch, self.cache)

    def decode(self, batch: MultiStepBatch) -> PendingTokens:
        """See `Runner.decode`."""
        with self._tidying():
            return self._decoder.decode(batch)

    def run_and_sample(self, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        """See `Runner.run_and_sample`."""

        def forward() -> Tensor:
            inputs, layout = prepare_inputs(batch.entries, self.cache.block_size, self.device)
            inputs = replace(inputs, token_ids=self._state.tokens(inputs.token_ids))
            logits: Tensor = self.model(inputs, self.backend.prepare(layout, self.cache))
            return logits

        with self._tidying():
            return self._decoder.sample(multi_step, forward)

    def raise_if_broken(self) -> None:
        """See `Runner.raise_if_broken`."""

    def close(self) -> None:
        """See `Runner.close`."""

    @contextmanager
    def _tidying(self) -> Iterator[None]:
        """When memory runs out, give back what torch keeps in pieces, so that less is tried with all there is."""
        try:
            yield
        except torch.OutOfMemoryError:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _graphs(self) -> GraphRunner:
        if self.device.type == "cuda" and isinstance(self.backend, CapturableAttention):
            capture: Capture = CudaCapture(self.device)
            if self._group.size > 1:
                capture = AgreedCapture(capture, self._group)
            return CapturedRunner(capture, self._graph_bytes)
        return EagerRunner()

    def _forward(self, inputs: TokenInputs, layout: DecodeMetadata) -> Tensor:
        backend = self.backend
        if isinstance(backend, CapturableAttention):
            step = backend.prepare_decode(layout, self.cache)
        else:
            step = backend.prepare(layout.on_host(), self.cache)
        logits: Tensor = self.model(inputs, step)
        return logits

    @torch.inference_mode()
    def _run(self, batch: Batch, cache: KVCache) -> Tensor:
        if self._is_deterministic:
            return self._run_in_passes(batch, cache)
        return self._logits(batch, cache).float()

    def _logits(self, batch: Batch, cache: KVCache) -> Tensor:
        inputs, layout = prepare_inputs(batch.entries, cache.block_size, self.device)
        logits: Tensor = self.model(inputs, self.backend.prepare(layout, cache))
        return logits

    def _run_in_passes(self, batch: Batch, cache: KVCache) -> Tensor:
        """The same in passes of a fixed shape; see `fixed_passes.py`."""
        wanted = [entry.num_logits for entry in batch.entries]
        firsts = np.cumsum(wanted) - wanted
        result = torch.empty(sum(wanted), self.vocab_size, device=self.device)
        with self._threads.one():
            for tile in split_into_passes(batch.entries):
                inputs, layout = prepare_inputs([piece.entry for piece in tile], cache.block_size, self.device)
                logits = self.model(pad_pass(inputs), self.backend.prepare(layout, cache))
                row = 0
                for piece in tile:
                    count, first = piece.entry.num_logits, firsts[piece.place] + piece.first_logit
                    result[first : first + count] = logits[row : row + count]
                    row += count
        return result

    def _on_trial(self, block_size: int) -> Callable[[Batch, int], Tensor]:
        """Runs batches on a small cache of their own, before there is the real one; nothing in it is rounded."""
        cache: KVCache | None = None

        def run(batch: Batch, num_blocks: int) -> Tensor:
            nonlocal cache
            if cache is None:
                cache = self._cache(num_blocks, block_size, self.dtype)
            return self._run(batch, cache)

        return run

    def _cache(self, num_blocks: int, block_size: int, dtype: torch.dtype, *, takes_memory: bool = False) -> KVCache:
        return KVCache.allocate(
            self.model.attention_layers,
            num_blocks,
            block_size,
            dtype=dtype,
            device=self.device,
            takes_memory=takes_memory,
        )

    def _reserved_bytes(self, config: EngineConfig) -> int:
        """What the largest step, graphs and the device's state take on the GPU besides weights and cache."""
        step, decode_step = self._measured_steps(config)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._graph_bytes = self._group.minimum(graph_bytes(total, decode_step))
        max_blocks = ceil_div(self.max_model_len, config.block_size)
        return step + self._graph_bytes + state_bytes(_max_batch_slots(config), max_blocks, _max_steps(config))

    def _measured_steps(self, config: EngineConfig) -> tuple[int, int]:
        """What the largest step of all takes, and the largest that only decodes."""
        batch, num_blocks = largest_step(config, self.max_model_len, num_logits=config.max_num_seqs)
        host_sampled, _ = largest_step(
            config, self.max_model_len, num_logits=min(config.max_num_seqs, HOST_SAMPLED_ROWS)
        )
        cache = self._cache(num_blocks, config.block_size, self.kv_dtype)
        decodes = largest_decode(batch_size(_max_batch_slots(config)), cache.padding_block)

        @torch.inference_mode()
        def sample_on_device(batch: Batch) -> None:
            logits = self._logits(batch, cache)
            state = padding_rows(len(logits), self.vocab_size, self.device)
            rows = torch.arange(len(logits), device=self.device)
            sample_tokens(logits, state, rows, most_demanding_mode(self.vocab_size), is_static=True)

        def sample_on_host(batch: Batch) -> None:
            logits = self._run(batch, cache)
            params = SamplingParams(top_p=0.9, top_k=50, min_p=0.01)
            states = [SamplingState(params, seed=row, index=0, position=1) for row in range(len(logits))]
            Sampler(self.vocab_size).sample(logits, states)

        largest = max(
            step_bytes(sample_on_device, batch, self.device), step_bytes(sample_on_host, host_sampled, self.device)
        )
        return largest, step_bytes(sample_on_device, decodes, self.device)


def _max_batch_slots(config: EngineConfig) -> int:
    """Sequences that may be in the batch: each takes a token of a step."""
    return min(config.max_num_seqs, config.max_num_batched_tokens)


def _max_steps(config: EngineConfig) -> int:
    """Steps in a multi-step batch at most."""
    return config.decode_steps or MOST_STEPS


def _check_deterministic(model: Decoder, device: torch.device) -> None:
    """Refuse what is known beforehand to depend on the batch."""
    if device.type != "cpu":
        raise ModelError(f"deterministic=True is there for the CPU only, not for {device.type}")
    # A trial may well miss it: how many rows an expert gets changes with every step.
    if isinstance(model, GenericDecoder) and any(parameter.dim() > 2 for parameter in model.parameters()):
        raise UnsupportedModel(
            "deterministic=True is not there for this model: its experts, in transformers' own code, multiply as many "
            "rows at once as happen to be routed to them"
        )


def _max_model_len(model: Decoder, config: EngineConfig) -> int:
    if config.max_model_len is None:
        return model.max_positions
    if config.max_model_len > model.max_positions:
        raise ModelError(
            f"max_model_len is {config.max_model_len}, but the model was made for {model.max_positions} positions"
        )
    return config.max_model_len


def device_of(config: EngineConfig, rank: int = 0) -> torch.device:
    """The device of one of the ranks that share a model: each has a GPU of its own. Raises `ModelError`."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    elif wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is 'cuda', but torch finds no CUDA GPU here")
    if wanted == "cpu" or config.tensor_parallel_size == 1:
        return torch.device(wanted)
    if torch.cuda.device_count() < config.tensor_parallel_size:
        raise ModelError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, but torch finds {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", rank)
