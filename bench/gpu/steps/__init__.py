"""The steps of a run on a GPU, in their order: what decides most comes first, what takes longest comes last."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One process of a run."""

    name: str
    title: str
    module: str
    limit: float
    """Seconds after which it is ended."""

    needs: float
    """Seconds below which it is not started."""

    names: tuple[str, ...] = ()
    """Arguments."""


def _step(name: str, title: str, limit: float, needs: float, *names: str, module: str | None = None) -> Step:
    return Step(name, title, f"bench.gpu.steps.{module or name}", limit, needs, names)


STEPS = (
    _step("limits", "the card: versions, copy and matrix product", 30, 10),
    _step("compile", "every kernel that the three models launch compiles", 60, 25),
    _step("kernels", "tests of the kernels", 100, 30),
    _step("tokens", "tokens of tiny models in every way of running them", 50, 20),
    _step("engine", "tests of the engine's device loop", 50, 20),
    _step("memcheck", "memory accesses of the attention, write and sampling kernels", 40, 20),
    _step("decode", "attention of decodes: blocks, stages, warps, programs", 70, 20),
    _step("shared", "attention of decodes that share prefixes, with groups and without", 30, 12),
    _step("prefill", "attention of prompts, beside torch's", 40, 15),
    _step("small", "sampling, norms, gates, products, experts", 30, 15),
    _step("article", "gpt2-large, 50 requests", 30, 20, "article", module="case"),
    _step("article-4096", "gpt2-large, 4,096 requests", 40, 25, "article-4096", module="case"),
    _step("ragged", "Qwen3-0.6B, 256 ragged requests", 50, 30, "ragged", module="case"),
    _step(
        "sequential",
        "transformers one by one, gpt2-large",
        30,
        20,
        "article-4096",
        "transformers-sequential",
        module="case",
    ),
    _step("vllm", "vLLM on the requests of article-4096 and ragged", 200, 60),
    _step("long", "Llama-3.1-8B, 512 requests of 1,000 + 128 tokens", 120, 60, "long", module="case"),
)
