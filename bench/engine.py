"""The bare engine on one workload, and where its steps' time goes: what `python -m bench engine` shows."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.arithmetic import geometry
from bench.ceilings import Ceilings
from bench.ceilings import measure as measure_ceilings
from bench.machine import computes_in, cores
from bench.models import save_config
from bench.pagemill import KV_CACHE_BYTES
from bench.profiling.profile import Profile, profiled
from bench.workload import Workload, WorkloadRequest
from engine import Engine, EngineConfig, SamplingParams
from engine.loading.hub import load_config, resolve_model

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a workload."""

    requests: int
    output_tokens: int
    seconds: float
    load_seconds: float
    profile: Profile | None = None
    """Of the same run; it makes a run a little slower."""

    ceilings: Ceilings | None = None
    """What the machine can do with the model's shapes, measured for a profile only."""


def measure(workload: Workload, precision: str, *, model: str | None = None, is_profiled: bool = False) -> Measured:
    """Run the workload once after a warm-up, on `model` (a directory or a hub id), or on the workload's own, made up.

    Raises `ModelError`, and ValueError where the model cannot take the workload.
    """
    torch.set_num_threads(cores())
    config = EngineConfig(
        device="cpu",
        dtype=computes_in() if precision == "int8" else precision,
        quantization="int8" if precision == "int8" else None,
        random_weights=model is None,
        cpu_kv_cache_bytes=KV_CACHE_BYTES,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        if model is None:
            save_config(workload.model, Path(directory))
        source = resolve_model(model or directory)
        engine = Engine.from_pretrained(source, config)
        shapes = geometry(load_config(source))
    load_seconds = time.perf_counter() - began
    _run(engine, workload.warm_up(WARM_UP_TOKENS))
    requests = workload.requests(0)
    with profiled(engine) if is_profiled else contextlib.nullcontext() as profile:
        seconds = _run(engine, requests)
    return Measured(
        requests=len(requests),
        output_tokens=sum(request.max_tokens for request in requests),
        seconds=seconds,
        load_seconds=load_seconds,
        profile=profile,
        ceilings=measure_ceilings(shapes, len(requests), precision, cores()) if is_profiled else None,
    )


def _run(engine: Engine, requests: Sequence[WorkloadRequest]) -> float:
    """Seconds for all; raises ValueError when one cannot run."""
    vocabulary = engine.vocab_size
    prompts = [[token % vocabulary for token in request.prompt] for request in requests]
    params = [SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=True) for one in requests]
    began = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - began
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        raise ValueError(failed)
    return seconds
