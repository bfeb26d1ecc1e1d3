"""How much of a real model's answers each precision keeps: `python -m bench.quality`.

The models are those of `--model smollm2` and `--model gemma3-270m`, in float32 the reference. `docs/models.md` gets a
table of each model; with `--precision`, which measures a part, only if `--keep` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.publish import write_section
from bench.quality import gguf_files
from bench.quality.float8_cache import Float8Rounding
from bench.quality.measures import GREEDY_TOKENS, Difference, LogProbabilities, greedy_answers
from bench.quality.text import question_prompts, windows
from bench.report import save
from cli.packaged_models import PACKAGED, fetch
from engine import Engine, EngineConfig
from engine.execution.model_runner import ModelRunner

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
MODELS = ("smollm2", "gemma3-270m")


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to store and compute a model."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    gguf_type: str | None = None
    """The file's matrices are rounded to it beforehand."""

    has_float8_cache: bool = False


PRECISIONS = {
    "float32": Precision("float32"),
    "bfloat16": Precision("bfloat16", {"dtype": "bfloat16"}),
    "int8": Precision("int8, float32 beside it", {"quantization": "int8"}),
    "int8-bfloat16": Precision("int8, bfloat16 beside it", {"quantization": "int8", "dtype": "bfloat16"}),
    "float8-cache": Precision("float8 KV cache", has_float8_cache=True),
    **{name: Precision(f"GGUF {name}", gguf_type=name) for name in gguf_files.TYPES},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; all")
    parser.add_argument("--precision", action="append", choices=list(PRECISIONS), help="repeatable; all")
    parser.add_argument("--keep", action="store_true", help="keep the result of a part, too")
    options = parser.parse_args()
    for model in options.model or MODELS:
        rows = measure(model, options.precision or list(PRECISIONS))
        print(table(rows))
        if options.keep or options.precision is None:
            save(f"quality-{model}", {"model": PACKAGED[model].title, "precisions": rows})
            write_section(
                f"quality {model}", f"{_heading(model, rows, options.precision or [])}\n\n{table(rows)}", DOCUMENT
            )


def measure(model: str, precisions: list[str]) -> dict[str, dict[str, Any]]:
    """The `Difference` of each from float32, and how many greedy answers are equal."""
    path = fetch(model)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="pagemill-quality-") as directory:
        with _engine(path, PRECISIONS["float32"]) as engine:
            assert engine.tokenizer is not None
            texts, questions = windows(engine.tokenizer), question_prompts(engine.tokenizer)
            reference = LogProbabilities(engine, texts, Path(directory))
            answers = greedy_answers(engine, questions)
        for name in precisions:
            with _engine(path, PRECISIONS[name]) as engine:
                difference = reference.difference(engine, texts)
                found = greedy_answers(engine, questions)
            equal = sum(one == other for one, other in zip(found, answers, strict=True))
            rows[name] = {**asdict(difference), "answers": len(answers), "same_answers": equal}
            print(_line(name, rows[name]), flush=True)
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line a precision."""
    return "\n".join(
        [
            "| | perplexity | more than float32 | mean \\|Δ log p\\| | mean KL | same best token | same answers |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_line(name, row) for name, row in rows.items()),
        ]
    )


def _line(name: str, row: Mapping[str, Any]) -> str:
    found = Difference(**{key: value for key, value in row.items() if key not in ("answers", "same_answers")})
    cells = [
        PRECISIONS[name].title,
        f"{found.perplexity:.3f}",
        f"{found.perplexity_change:+.2%}",
        f"{found.mean_change:.4f}",
        f"{found.mean_kl:.5f}",
        f"{found.same_top:.1%}",
        f"{row['same_answers']} of {row['answers']}",
    ]
    return f"| {' | '.join(cells)} |"


def _heading(model: str, rows: Mapping[str, Mapping[str, Any]], chosen: list[str]) -> str:
    tokens = next(iter(rows.values()))["tokens"]
    command = " ".join(["python -m bench.quality --model", model, *(f"--precision {name}" for name in chosen)])
    return f"{PACKAGED[model].title} (`{command}`; {tokens:,} tokens, greedy answers of up to {GREEDY_TOKENS} tokens):"


@contextlib.contextmanager
def _engine(path: Path, precision: Precision) -> Iterator[Engine]:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 1024, "num_kv_blocks": 2048}
    settings |= {"enable_prefix_caching": False, **precision.settings}
    with tempfile.TemporaryDirectory(prefix="pagemill-quality-") as directory:
        if precision.gguf_type is not None:
            source, path = path, Path(directory) / path.name
            gguf_files.requantize(source, path, precision.gguf_type)
        engine = Engine.from_pretrained(path, EngineConfig(**settings))
        if precision.has_float8_cache:
            assert isinstance(engine.runner, ModelRunner)
            engine.runner.backend = Float8Rounding(engine.runner.backend)
        yield engine


if __name__ == "__main__":
    main()
