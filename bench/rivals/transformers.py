"""transformers, used in the three ways that it offers: one by one, as padded batches, and batching continuously."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.contender import Contender, Environment, Output, Setup, WorkloadRunner
from bench.workload import WorkloadRequest

BATCH = 50
# One by one takes many times as long as anything else: this many requests, and the time of all from them.
SAMPLE = 3
PAGE = 32  # positions in a page of its cache
PATIENCE = 600.0  # seconds for one result


class _Transformers(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup.threads)
        torch.set_grad_enabled(False)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            setup.model, dtype=getattr(torch, setup.precision), attn_implementation="sdpa"
        )
        self._model.eval()
        self._eos_token_ids = list(setup.eos_token_ids)


class _Padded(_Transformers):
    batch = BATCH

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        outputs: list[Output] = []
        for start in range(0, len(requests), self.batch):
            outputs += self._generate(requests[start : start + self.batch])
        return outputs

    def _generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        import torch
        from transformers import GenerationConfig

        width = max(len(request.prompt) for request in requests)
        prompts = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(prompts)
        for row, request in enumerate(requests):
            prompts[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        longest = max(request.max_tokens for request in requests)
        eos = self._eos_token_ids if requests[0].stops_at_eos else None
        config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=eos, pad_token_id=0)
        generated = self._model.generate(prompts, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return [Output.of(ids, request, self._eos_token_ids) for ids, request in zip(generated, requests, strict=True)]


class _OneByOne(_Padded):
    batch = 1


class _Continuous(_Transformers):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        # On a CPU it does not find out by itself how much fits: room for everything at once.
        self._num_blocks = setup.num_requests * (-(-setup.max_tokens // PAGE) + 1)

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        longest = max(request.max_tokens for request in requests)
        # An end of sequence that no token is.
        eos = self._eos_token_ids if requests[0].stops_at_eos else -1
        generation = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=eos, pad_token_id=0)
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=self._num_blocks, max_batch_tokens=2048)
        tokens: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=generation, block=True, timeout=5, continuous_batching_config=batching
        ) as manager:
            names = [manager.add_request(list(one.prompt), max_new_tokens=one.max_tokens) for one in requests]
            while len(tokens) < len(requests):
                result = manager.get_result(timeout=PATIENCE)
                if result is None or result.error:
                    raise RuntimeError("no result came" if result is None else result.error)
                if result.is_finished():
                    tokens[result.request_id] = list(result.generated_tokens)
        return [
            Output.of(tokens[name], request, self._eos_token_ids) for name, request in zip(names, requests, strict=True)
        ]


_ENVIRONMENT = Environment("transformers", ("transformers==5.23.0", "torch==2.13.0", "numpy==2.4.6"))


def _contender(name: str, title: str, start: type[_Transformers], sample: int | None = None) -> Contender:
    return Contender(
        name=f"transformers-{name}",
        title=f"transformers, {title}",
        precisions=("float32", "bfloat16"),
        start=start,
        packages=("transformers", "torch"),
        environment=_ENVIRONMENT,
        sample=sample,
    )


CONTENDERS = (
    _contender("padded", "padded batches", _Padded),
    _contender("continuous", "continuous batching", _Continuous),
    _contender("single", "one by one", _OneByOne, SAMPLE),
)
