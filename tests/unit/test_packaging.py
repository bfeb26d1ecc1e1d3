"""The traps of packaging: what a wheel holds, and what our top-level names do to others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# What transformers probes for is Hugging Face's package `kernels`, at a version from which it is used.
LOOKS_LIKE_HUGGING_FACE = (0, 18)
SHIPPED = (
    "demo/model/config.json",
    "demo/model/model.safetensors",
    "demo/model/tokenizer.json",
    "demo/words.txt",
    "migrations/script.py.mako",
    "migrations/versions/0001_first_schema.py",
    "kernels/__init__.py",
    "kernels/cpu/source/linear.cpp",
    "kernels/cpu/source/vectors.h",
    "api/dashboard/static/index.html",
    "api/dashboard/static/pages/jobs.js",
    "cli/launcher.py",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as pip builds it, without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(REPOSITORY)], check=True)
    (built,) = directory.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(directory)
    return directory


def _run(code: str, first_on_path: Path, directory: Path) -> None:
    """Run `code` where our packages come from `first_on_path`, and fail as it fails."""
    environment = os.environ | {"PYTHONPATH": str(first_on_path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_wheel_holds_more_than_code(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert not [name for name in SHIPPED if name not in names]
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_every_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    sources = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split()
    if not sources:
        pytest.skip("not a git checkout")
    names = set(wheel.namelist())
    assert not [name for name in sources if not name.startswith(("tests/", "examples/")) and name not in names]


def test_version_is_below_that_of_hugging_faces_kernels() -> None:
    assert tuple(int(part) for part in PROJECT["version"].split(".")[:2]) < LOOKS_LIKE_HUGGING_FACE


def test_project_is_marked_do_not_upload() -> None:
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]


def test_kernels_says_nothing_at_import() -> None:
    assert (REPOSITORY / "kernels" / "__init__.py").read_bytes() == b""


@pytest.mark.parametrize("source", ["checkout", "wheel"])
def test_transformers_does_not_take_our_kernels_for_hugging_faces(source: str, unpacked: Path, tmp_path: Path) -> None:
    where = {"checkout": REPOSITORY, "wheel": unpacked}[source]
    _run(
        "import kernels, transformers, transformers.utils\n"
        f"assert kernels.__file__.startswith({str(where)!r}), kernels.__file__\n"
        "assert not transformers.utils.is_kernels_available()\n"
        "from transformers import AutoModelForCausalLM\n",
        where,
        tmp_path,
    )


def test_api_courier_and_migrate_need_no_torch(unpacked: Path, tmp_path: Path) -> None:
    _run(
        "import sys\n"
        "for name in ('torch', 'triton', 'transformers', 'tokenizers', 'safetensors', 'numpy', 'engine', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        "import api.server, worker.courier, migrations.run, cli.main, cli.stack, cli.client, demo.tasks\n"
        "import cli.commands.processes, cli.commands.jobs, cli.commands.keys, cli.commands.doctor\n",
        unpacked,
        tmp_path,
    )


def test_worker_without_torch_says_what_it_needs(unpacked: Path, tmp_path: Path) -> None:
    _run(
        "import sys, contextlib, io\n"
        "sys.modules['torch'] = None\n"
        "from cli.commands import processes, terminal\n"
        "said = terminal.err.file = io.StringIO()\n"
        "assert processes.worker(['demo'], served_names=[], gpus=None, options={}) == 1\n"
        "assert \"'.[worker]'\" in said.getvalue(), said.getvalue()\n",
        unpacked,
        tmp_path,
    )


def test_tests_is_a_package() -> None:
    assert (REPOSITORY / "tests" / "__init__.py").exists(), "else tests/api would shadow api"


def test_constraints_install_everywhere() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)], "pinned, and no +cpu"


def test_every_dependency_is_pinned() -> None:
    def normalised(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    names = {normalised(re.match(r"[\w.-]+", line)[0]) for line in wanted}  # type: ignore[index]
    pinned = {normalised(line.partition("==")[0]) for line in (REPOSITORY / "constraints.txt").read_text().split()}
    assert names <= pinned, names - pinned


def test_triton_is_for_linux() -> None:
    extras = PROJECT["optional-dependencies"]
    for extra in ("gpu", "dev"):
        (triton,) = (line for line in extras[extra] if line.startswith("triton"))
        assert triton.endswith("; sys_platform == 'linux'")
    assert not [line for line in extras["worker"] if line.startswith("triton")], "700 MB that no CPU needs"


def test_torch_is_the_workers_alone() -> None:
    assert not [line for line in PROJECT["dependencies"] if re.match(r"torch|triton|transformers", line)]
