"""`pagemill worker --gpus`: one worker a GPU, under a supervisor that starts each again by itself when it dies."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cli.child_logs import ChildLog
from cli.gpus import choose_gpus, group_gpus
from cli.models import ModelSource
from cli.supervisor import Child, ChildFailed, StopRequested, Supervisor
from cli.worker_child import child_environment, worker_child
from jobs.database import DatabaseNotConfigured, sqlalchemy_url
from jobs.settings import Settings

LOOK = 1.0  # seconds between two looks at whether any worker is left


def run_gpu_workers(settings: Settings, sources: Sequence[ModelSource], wanted: str) -> int:
    """Run until a signal comes, or each worker has ended as an operator asked. Returns the exit code.

    It is 1 where a worker cannot start. Raises `NoSuchGpu` for what `wanted` names and is not there.
    """
    if settings.device == "auto":  # a worker that finds no GPU must say so, and not take the CPU
        settings = settings.model_copy(update={"device": "cuda"})
    groups = group_gpus(choose_gpus(wanted, os.environ), settings.tensor_parallel_size)
    children = _children(settings, sources, groups)
    with (
        contextlib.closing(ChildLog(None, sys.stdout, colour=sys.stdout.isatty())) as log,
        Supervisor(log) as supervisor,
        supervisor.stop_on_signals(),
    ):
        try:
            supervisor.start(*children)
            log.write("pagemill", f"every worker serves: {len(children)} on GPUs {', '.join(map(','.join, groups))}")
            while not supervisor.wait(LOOK) and not supervisor.all_ended():
                pass
        except StopRequested:
            pass
        except ChildFailed as failure:
            print(f"\n{failure}", file=sys.stderr)
            return 1
    return 0


def _children(settings: Settings, sources: Sequence[ModelSource], groups: Sequence[Sequence[str]]) -> list[Child]:
    if settings.database_url is None:
        raise DatabaseNotConfigured
    database = create_engine(sqlalchemy_url(settings.database_url), poolclass=NullPool)
    children = []
    for number, gpus in enumerate(groups):
        devices = ",".join(gpus)
        environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | child_environment(settings)
        environment |= {"CUDA_VISIBLE_DEVICES": devices}
        if settings.metrics_port:
            environment["PAGEMILL_METRICS_PORT"] = str(settings.metrics_port + number)
        children.append(worker_child(f"gpu {devices}", settings, sources, database, environment))
    return children
