"""Where the service of a data directory is, written by `up` while it runs and read by every other command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.data_dir import write_private
from jobs.settings import Settings

FILE = "running.json"


@dataclass(frozen=True, slots=True)
class Running:
    """The addresses of one `up`; the two inner ones hold passwords, hence the file is private."""

    url: str
    database_url: str
    redis_url: str

    def write(self, data_dir: Path) -> None:
        write_private(data_dir / FILE, json.dumps(asdict(self)))

    @staticmethod
    def remove(data_dir: Path) -> None:
        (data_dir / FILE).unlink(missing_ok=True)

    @classmethod
    def read(cls, data_dir: Path) -> Running | None:
        """What the last `up` wrote; it may have been killed since."""
        try:
            return cls(**json.loads((data_dir / FILE).read_text()))
        except FileNotFoundError:
            return None


def with_running(settings: Settings) -> Settings:
    """Settings whose unset addresses are those of the `up` that runs on the data directory."""
    running = Running.read(settings.data_dir)
    if running is None:
        return settings
    update: dict[str, object] = {}
    if settings.database_url is None:
        update["database_url"] = running.database_url
    if settings.redis_url is None:
        update["redis_url"] = running.redis_url
    if "url" not in settings.model_fields_set:
        update["url"] = running.url
    return settings.model_copy(update=update)
