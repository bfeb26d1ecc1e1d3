"""Where the lines go that child processes write: a file for each child, and one labelled stream for people."""

from __future__ import annotations

import logging
import logging.handlers
import threading
from pathlib import Path
from typing import TextIO

FILE_BYTES = 16 * 1024 * 1024  # a log is moved to NAME.log.1 at this size
LABEL_WIDTH = 9
COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")  # ECMA-48 foreground colours, no red


class ChildLog:
    """Used by one thread for each child."""

    def __init__(self, directory: Path | None, stream: TextIO | None = None, *, colour: bool = False) -> None:
        """`directory` gets NAME.log for each child, `stream` all lines with the name before them; None: neither."""
        self._directory = directory
        self._stream = stream
        self._colour = colour
        self._labels: dict[str, str] = {}
        self._files: dict[str, logging.handlers.RotatingFileHandler] = {}
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        """Write one line, given without its newline."""
        with self._lock:
            if self._directory is not None:
                if name not in self._files:
                    self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._files[name] = logging.handlers.RotatingFileHandler(
                        self._directory / f"{name}.log", maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8"
                    )
                self._files[name].emit(logging.makeLogRecord({"msg": line}))
            if self._stream is not None:
                try:
                    print(self._label(name) + line, file=self._stream, flush=True)
                except OSError:
                    # The stream has no reader any more (`pagemill up | head`); the files go on.
                    self._stream = None

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _label(self, name: str) -> str:
        if name not in self._labels:
            label = f"{name:<{LABEL_WIDTH}} | "
            if self._colour:
                label = f"\x1b[{COLOURS[len(self._labels) % len(COLOURS)]}m{label}\x1b[0m"
            self._labels[name] = label
        return self._labels[name]
