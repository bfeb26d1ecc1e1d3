"""The contenders of a GPU case. Each is loaded, and its library imported, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.workload import WorkloadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSetup:
    """What a contender is told when it starts on a GPU case; `bench.contender.Setup` is that of the CPU comparison."""

    model: Path
    """A directory with a configuration and a tokenizer, without weights."""

    device: str
    dtype: str
    max_tokens: int
    """Of the longest request, prompt and output together."""

    max_num_seqs: int
    temperature: float


class Loaded(Protocol):
    def generate(self, requests: Sequence[WorkloadRequest]) -> list[int]:
        """Complete all, handed over at once; how many tokens each brought."""


class Pagemill:
    def __init__(self, setup: CaseSetup) -> None:
        from engine import Engine, EngineConfig

        self.engine = Engine.from_pretrained(
            setup.model,
            EngineConfig(
                device=setup.device,
                dtype=setup.dtype,
                random_weights=True,
                max_model_len=setup.max_tokens,
                max_num_seqs=setup.max_num_seqs,
                max_num_batched_tokens=max(8192, setup.max_num_seqs) if setup.device == "cuda" else 256,
                num_kv_blocks=None if setup.device == "cuda" else 256,
            ),
        )
        self._temperature = setup.temperature

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[int]:
        from engine import SamplingParams

        params = [
            SamplingParams(temperature=self._temperature, seed=place, max_tokens=one.max_tokens, ignore_eos=True)
            for place, one in enumerate(requests)
        ]
        outputs = self.engine.generate([one.prompt for one in requests], params)
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        return [len(output.token_ids) for output in outputs]


class _Transformers:
    def __init__(self, setup: CaseSetup) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        config = AutoConfig.from_pretrained(setup.model)
        with torch.device(setup.device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup.dtype))
        self.model.eval()
        self.setup = setup


class Sequential(_Transformers):
    """The article's baseline: one request after the other."""

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[int]:
        import torch
        from transformers import GenerationConfig

        counts = []
        for request in requests:
            prompt = torch.tensor([request.prompt], device=self.setup.device)
            config = GenerationConfig(
                max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            generated = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            counts.append(generated.shape[1] - prompt.shape[1])
        return counts


class Continuous(_Transformers):
    def generate(self, requests: Sequence[WorkloadRequest]) -> list[int]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        longest = max(request.max_tokens for request in requests)
        # An end of sequence that no token is.
        generation = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # On a CPU it does not find out by itself how much fits.
        sizes = {} if self.setup.device == "cuda" else {"num_blocks": 64, "max_batch_tokens": 256}
        counts: dict[str, int] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=generation,
            block=True,
            timeout=5,
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
        ) as manager:
            names = [manager.add_request(list(one.prompt), max_new_tokens=one.max_tokens) for one in requests]
            while len(counts) < len(requests):
                result = manager.get_result(timeout=600.0)
                if result is None or result.error:
                    raise RuntimeError("no result came" if result is None else result.error)
                if result.is_finished():
                    counts[result.request_id] = len(result.generated_tokens)
        return [counts[name] for name in names]


CONTENDERS: dict[str, Callable[[CaseSetup], Loaded]] = {
    "pagemill": Pagemill,
    "transformers-continuous": Continuous,
    "transformers-sequential": Sequential,
}

SAMPLE = {"transformers-sequential": 8}
"""How many requests really run where all would take too long; the time is scaled by the tokens generated."""
