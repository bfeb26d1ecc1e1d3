"""The processes of a service, each in the foreground until a signal comes."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cli import logs, models
from cli.commands.terminal import err, out, reports_errors
from cli.first_key import store_key
from jobs.database import DatabaseNotConfigured
from jobs.roles import Role
from jobs.settings import Settings

logger = logging.getLogger(__name__)


@reports_errors
def up(model_names: Sequence[str], *, data_dir: Path | None, host: str | None, port: int | None) -> int:
    from cli.up import up as run

    options = {"data_dir": data_dir, "host": host, "port": port}
    settings = Settings().model_copy(update={key: value for key, value in options.items() if value is not None})
    for names in model_names or [settings.model or models.DEMO]:
        for name in models.split(names):
            models.resolve(name)  # what must be fetched is, before anything starts
    return run(settings, list(model_names))


@reports_errors
def api() -> int:
    from api.server import serve

    settings = Settings()
    logs.configure(settings.log_level, settings.log_format)
    serve(settings)
    return 0


@reports_errors
def worker(
    model_names: Sequence[str], *, served_names: Sequence[str], gpus: str | None, options: Mapping[str, object]
) -> int:
    """`served_names` are those of the models, in their order, where there are any. `gpus`: a worker for each of them.

    `options` stand for settings of the same names; None leaves a setting as it is.
    """
    settings = Settings().model_copy(update={key: value for key, value in options.items() if value is not None})
    listed = model_names or ([] if settings.model is None else [settings.model])
    names = [name for in_turn in listed for name in models.split(in_turn)]
    if not names:
        err.print(
            "Name a model with --model: demo, smollm2, a directory, a GGUF file, or the id of a model on the hub.",
            style="red",
        )
        return 2
    if served_names and len(served_names) != len(names):
        err.print(f"{len(names)} models, but {len(served_names)} times --served-name.", style="red")
        return 2
    if len(set(served_names or names)) < len(names):
        err.print("Two models have the same name: give each another with --served-name.", style="red")
        return 2
    logs.configure(settings.log_level, settings.log_format)
    if gpus is not None:
        return _gpu_workers(settings, _sources(names, served_names), gpus)

    from cli.engines import engine_config, is_in_main_memory
    from engine import Engine
    from engine.errors import InvalidConfig
    from worker.generation.engine_roster import ServedModel
    from worker.generation.service import run_worker

    sources = _sources(names, served_names)
    try:
        config = engine_config(settings)
    except InvalidConfig as error:
        err.print(error.message, style="red", markup=False)
        return 1
    logger.info("loading %s", ", ".join(source.location for source in sources))
    served = [
        ServedModel(
            source.served_name,
            partial(Engine.from_pretrained, source.location, config),
            may_stay=is_in_main_memory(settings),
        )
        for source in sources
    ]
    return run_worker(settings, served, device=_device_name(settings.device))


def _sources(names: Sequence[str], served_names: Sequence[str]) -> list[models.ModelSource]:
    return [models.resolve(*named) for named in itertools.zip_longest(names, served_names)]


def _device_name(device: str) -> str:
    """A device as people look at it: with the GPUs that this process may see, where they were chosen."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{device}:{chosen}" if device == "cuda" and chosen else device


def _gpu_workers(settings: Settings, sources: Sequence[models.ModelSource], gpus: str) -> int:
    from cli.gpu_workers import run_gpu_workers
    from cli.gpus import NoSuchGpu

    try:
        return run_gpu_workers(settings, sources, gpus)
    except NoSuchGpu as error:
        err.print(str(error), style="red", markup=False)
        return 2


@reports_errors
def courier() -> int:
    from worker.courier.process import run_courier

    settings = Settings()
    logs.configure(settings.log_level, settings.log_format)
    return run_courier(settings)


@reports_errors
def migrate() -> int:
    from migrations.run import upgrade

    settings = Settings()
    if settings.database_url is None:
        raise DatabaseNotConfigured
    upgrade(settings.database_url)
    out.print("The schema is the newest.")
    if settings.api_key is not None:
        key = settings.api_key.get_secret_value()
        added = store_key(settings, settings.database_url, key, name="PAGEMILL_API_KEY", role=Role.OPERATOR).is_new
        out.print("PAGEMILL_API_KEY was " + ("added." if added else "there already."))
    return 0
