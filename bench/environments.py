"""Virtual environments for what Pagemill is measured against, made by pip where they are missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.contender import Environment

SHOWN_LINES = 5


class NotInstallable(RuntimeError):
    """pip failed. The message holds the end of what it said."""


def python_of(environment: Environment, cache: Path) -> Path:
    """The interpreter of an environment under `cache`, installed now if it is not there; raises `NotInstallable`.

    Our package `bench` is linked into it, and nothing else of ours: rivals look for packages that happen to be named
    like some of our own.
    """
    directory = cache / "venvs" / environment.name
    python = directory / "bin" / "python"
    stamp = directory / "installed.txt"
    wanted = "\n".join([*environment.requirements, *(f"-{name}" for name in environment.unwanted)]) + "\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Installing {', '.join(environment.requirements)} …", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        _run([sys.executable, "-m", "venv", directory])
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *environment.requirements])
        if environment.unwanted:
            _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.unwanted])
        stamp.write_text(wanted)
    _link_bench(python)
    return python


def _link_bench(python: Path) -> None:
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    link, target = Path(found.stdout.strip()) / "bench", Path(__file__).parent
    if link.is_symlink() and link.resolve() != target.resolve():
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(target)


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        raise NotInstallable(f"{Path(command[0]).name} {command[1]} {command[2]} failed: {end}")
