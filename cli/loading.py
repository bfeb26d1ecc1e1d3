"""What the load of a model waits for, shown to the person at the terminal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

SOURCES = ("engine.loading.progress", "kernels.cpu.library")
"""The loggers that tell of a load: weights that were read, kernels that are compiled."""


@contextlib.contextmanager
def loading_shown(console: Console, model: str) -> Iterator[None]:
    """Show the load inside the block: a bar on a terminal, a line now and then elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    is_terminal = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_terminal) as progress:
        description = f"loading {model}"
        handler: logging.Handler = _Bar(progress, progress.add_task(description, total=None))
        if not is_terminal:
            console.print(description, markup=False)
            handler = _Lines(console)
        loggers = [logging.getLogger(name) for name in SOURCES]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG if is_terminal else logging.INFO)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = True


class _Bar(logging.Handler):
    """Moves a progress bar; records without a size become its description."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        super().__init__()
        self._progress, self._task = progress, task

    def emit(self, record: logging.LogRecord) -> None:
        total = getattr(record, "total_bytes", None)
        completed = getattr(record, "loaded_bytes", None)
        self._progress.update(self._task, description=record.getMessage(), total=total, completed=completed)


class _Lines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False)
