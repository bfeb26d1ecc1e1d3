"""The processes of a service, each in the foreground until a signal comes."""

from __future__ import annotations

import itertools
import logging
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
def worker(model_names: Sequence[str], *, served_names: Sequence[str], options: Mapping[str, object]) -> int:
    """`served_names` are those of the models, in their order, where there are any.

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
    logs.configure(settings.log_level, settings.log_format)

    from cli.engines import engine_config, is_in_main_memory
    from engine import Engine
    from engine.errors import InvalidConfig
    from worker.generation.engine_roster import ServedModel
    from worker.generation.service import run_worker

    sources = [models.resolve(*named) for named in itertools.zip_longest(names, served_names)]
    if len({source.served_name for source in sources}) < len(sources):
        err.print("Two models have the same name: give each another with --served-name.", style="red")
        return 2
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
    return run_worker(settings, served, device=settings.device)


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
