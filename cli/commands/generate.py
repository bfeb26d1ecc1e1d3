"""The bare engine: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from cli import logs, models
from cli.commands.terminal import err, out, reports_errors
from cli.loading import loading_shown
from jobs.settings import Settings


@reports_errors
def generate(
    prompts: Sequence[str], model: str | None, *, options: Mapping[str, Any], device: str | None, dtype: str | None
) -> int:
    """Print each completion after its prompt. A prompt that fails makes the exit code 1; the others are printed."""
    from cli.engines import engine_config
    from engine import SamplingParams
    from engine.errors import EngineError

    update = {key: value for key, value in {"device": device, "dtype": dtype}.items() if value is not None}
    settings = Settings().model_copy(update=update)
    logs.configure("warning")
    source = models.resolve(model or models.split(settings.model or models.DEMO)[0])
    try:
        config = engine_config(settings)
        with loading_shown(err, source.served_name):
            from engine import Engine  # torch comes with it, the first part of the wait

            engine = Engine.from_pretrained(source.location, config)
        outputs = engine.generate(list(prompts), SamplingParams(**options))
    except EngineError as error:
        err.print(error.message, style="red", markup=False)
        return 1
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.error is not None:
            err.print(f"{prompt}: {output.error}", style="red", markup=False)
        else:
            out.print(Text.assemble((prompt, "bold"), output.text))
    return 0 if all(output.error is None for output in outputs) else 1
