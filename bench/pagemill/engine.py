"""The bare engine, as a library."""

from __future__ import annotations

from collections.abc import Sequence

from bench.contender import PRECISIONS, Contender, Output, Setup, WorkloadRunner
from bench.pagemill import KV_CACHE_BYTES
from bench.workload import WorkloadRequest


class _Engine(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        import torch

        from engine import Engine, EngineConfig

        torch.set_num_threads(setup.threads)
        is_int8 = setup.precision == "int8"
        config = EngineConfig(
            device="cpu",
            dtype=setup.compute if is_int8 else setup.precision,
            quantization="int8" if is_int8 else None,
            cpu_kv_cache_bytes=KV_CACHE_BYTES,
        )
        self._eos_token_ids = setup.eos_token_ids
        self._engine = Engine.from_pretrained(setup.model, config)

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        from engine import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=not one.stops_at_eos)
            for one in requests
        ]
        results = self._engine.generate([one.prompt for one in requests], params)
        return [
            Output.of(result.token_ids, one, self._eos_token_ids) for result, one in zip(results, requests, strict=True)
        ]


CONTENDERS = (
    Contender(
        name="engine",
        title="Pagemill, bare engine",
        precisions=PRECISIONS,
        start=_Engine,
        packages=("torch", "transformers"),
    ),
)
