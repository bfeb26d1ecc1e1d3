"""The packages of a bare GPU machine: an environment in which everything else that is installed here is absent.

`gpu_machine_packages.txt` lists what such a machine's image has (torch, Triton, transformers and scientific packages).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Python imports `sitecustomize` when it starts, in child processes too.
_SITECUSTOMIZE = """
import importlib.machinery, importlib.metadata, json, re

with open({path!r}) as file:
    _absent = json.load(file)
_modules, _distributions = set(_absent["modules"]), set(_absent["distributions"])
_find_spec = importlib.machinery.PathFinder.find_spec
_discover = importlib.metadata.Distribution.discover

def find_spec(finder, name, path=None, target=None):
    return None if path is None and name in _modules else _find_spec(name, path, target)

def discover(**options):
    for found in _discover(**options):
        if re.sub("[-_.]+", "-", found.name).lower() not in _distributions:
            yield found

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
importlib.metadata.Distribution.discover = staticmethod(discover)
"""


def gpu_machine_environment(directory: Path) -> dict[str, str]:
    """Variables for a child process that finds no package a GPU machine lacks; files for it go into `directory`."""
    present = _present()
    absent: dict[str, list[str]] = {"modules": [], "distributions": []}
    for module, distributions in packages_distributions().items():
        names = {canonicalize_name(name) for name in distributions}
        if not names & present:
            absent["modules"].append(module)
            absent["distributions"] += names
    path = directory / "absent.json"
    path.write_text(json.dumps(absent))
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(path=str(path)))
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), *([inherited] if inherited else [])])}


def _present() -> set[str]:
    """What the machine has, with what the versions installed here need of each other, and this checkout."""
    present = {"pagemill"}
    waiting = Path(__file__).with_name("gpu_machine_packages.txt").read_text().split()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in present and name != "pydantic":  # the machine's version of typer needs none
            present.add(name)
            with suppress(PackageNotFoundError):
                needs = map(Requirement, distribution(name).requires or ())
                waiting += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return present
