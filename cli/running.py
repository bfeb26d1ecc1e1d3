"""Where the service of a data directory is, written by `up` while it runs and read by every other command."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.data_dir import DataDir, DataDirError, write_private
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
        """What the last `up` wrote; it may have been killed since. Raises DataDirError where the file is damaged."""
        file = data_dir / FILE
        try:
            return cls(**json.loads(file.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # its content holds passwords and is not repeated
            raise DataDirError(
                f"{file} is damaged. Stop `pagemill up` and start it again, or remove the file."
            ) from None


def require_not_running(data_dir: DataDir) -> None:
    """Raise DataDirError, with the address, where an `up` runs on the data directory now."""
    holder = data_dir.holder()
    if holder is None:
        return
    where = ""
    with contextlib.suppress(DataDirError):
        running = Running.read(data_dir.path)
        where = f", and serves on {running.url}" if running is not None else ""
    raise DataDirError(
        f"Pagemill already runs on {data_dir.path} (process {holder}){where}. "
        "Stop it, or choose another directory with --data-dir."
    )


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
