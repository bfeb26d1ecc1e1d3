"""Train the demo model: a Llama of 0.6 million weights that adds, reverses and sorts (`demo/tasks.py`).

    python -m demo.train [DIRECTORY]        default: demo/model, where the shipped model lies

Writes what `transformers` and Pagemill's engine load, and `training.log` beside it. The same machine and the same
versions give the same weights. The hold-out is looked at after the last step and takes no part in training.
"""

import argparse
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.muon import Muon
from demo.tasks import LONGEST_ANSWER, LONGEST_PROMPT, TASKS, Example, holdout, training_examples
from demo.tokenizer import build_tokenizer

MODEL_DIRECTORY = Path(__file__).parent / "model"
HOLDOUT_PER_TASK = 900

_IGNORED = -100
# <s>, the prompt and the answer; the answer's </s> is predicted, never read.
_LONGEST_INPUT = 1 + LONGEST_PROMPT + LONGEST_ANSWER


@dataclass(frozen=True)
class Settings:
    """All that decides what comes out."""

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    # Far more than the tasks need: a long prompt gets nonsense from this model, but gets an answer.
    max_positions: int = 2048
    batch_size: int = 256
    steps: int = 1300
    warmup_steps: int = 100
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    seed: int = 0
    # More threads hardly help matrices this small, and one sums in the same order on any number of cores.
    threads: int = 1


def train(settings: Settings, directory: Path, log: Callable[[str], None]) -> None:
    """Train from random weights and write model and tokenizer to `directory`."""
    started = time.monotonic()
    _make_deterministic(settings)
    tokenizer = build_tokenizer(settings.max_positions)
    model = _build_model(settings, tokenizer)
    log(f"weights: {sum(weight.numel() for weight in model.parameters()):,}")

    optimizers = _build_optimizers(settings, model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings)) for optimizer in optimizers]
    examples = training_examples(random.Random(settings.seed))
    losses = []
    for step in range(1, settings.steps + 1):
        inputs, targets = _tensors(tokenizer, list(islice(examples, settings.batch_size)))
        asked = targets != _IGNORED
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), targets[asked])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == settings.steps:
            mean = sum(losses) / len(losses)
            log(f"step {step:5}   loss {mean:.5f}   {time.monotonic() - started:5.0f} s")
            losses.clear()

    model.save_pretrained(directory)
    # safetensors lets only the owner read what it writes; users of an installed package must too.
    (directory / "model.safetensors").chmod(0o644)
    # The chat template belongs into tokenizer_config.json, where every reader of tokenizers looks for it.
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for task in TASKS:
            right = _count_right(model, tokenizer, holdout(task, HOLDOUT_PER_TASK))
            log(f"hold-out {str(dtype).removeprefix('torch.'):8}   {task:8} {right} of {HOLDOUT_PER_TASK} exact")
    log(f"wall time {time.monotonic() - started:.0f} s, processor time {time.process_time():.0f} s")


def _make_deterministic(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)  # the order of a sum depends on how many threads share it
    torch.use_deterministic_algorithms(True)


def _build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _build_optimizers(settings: Settings, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learn much sooner with it; AdamW for embedding and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embedding]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or weight is embedding]
    return [
        Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _schedule(settings: Settings) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to zero: the factor of the learning rates at a step."""

    def factor(step: int) -> float:
        warmup = (step + 1) / settings.warmup_steps
        return min(warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))

    return factor


def _tensors(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and what each position must predict, both [examples, positions]; only the answers count, with </s>.

    Attention is causal, so padding to the right needs no mask.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    inputs = torch.full((len(examples), _LONGEST_INPUT), tokenizer.pad_token_id)
    targets = torch.full_like(inputs, _IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end] = torch.tensor([*answer, tokenizer.eos_token_id])
    return inputs, targets


@torch.no_grad()
def _count_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> int:
    """How many answers greedy decoding would give exactly.

    It does if and only if every token of the answer is the likeliest after the right ones before it, so one forward
    pass tells. `demo/evaluate.py` asks the engine instead, token by token.
    """
    inputs, targets = _tensors(tokenizer, examples)
    likeliest = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
    return int(((likeliest == targets) | (targets == _IGNORED)).all(dim=1).sum())


def _header(settings: Settings) -> Iterator[str]:
    yield "python -m demo.train"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    yield f"versions: Python {platform.python_version()}, {versions}"
    yield f"machine: {platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    yield "settings: " + ", ".join(f"{name}={value}" for name, value in asdict(settings).items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("directory", type=Path, nargs="?", default=MODEL_DIRECTORY)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    directory = arguments.pop("directory")
    settings = Settings(**arguments)

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "training.log").open("w", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        for line in _header(settings):
            log(line)
        train(settings, directory, log)


if __name__ == "__main__":
    main()
