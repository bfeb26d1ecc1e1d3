"""What all tests share: where and with how many threads they compute, and the plugin with databases of the service."""

from __future__ import annotations

import gc
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

if "+cpu" in version("torch") or not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd")):
    # Without a GPU, Triton's kernels run in its interpreter. The variable must be set before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On tiny tensors threads only wait for each other, and two tests at a time already share the machine. Processes that
# tests start inherit this. What computes with several threads is tested with as many as it is told.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine for GPU tests has torch and none of the service's packages.
HAS_SERVICE = find_spec("sqlalchemy") is not None
pytest_plugins = ["tests.support.database_fixtures"] if HAS_SERVICE else []

# How long an example takes depends on what else uses the machine.
hypothesis_settings.register_profile("pagemill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("pagemill")


# The garbage collector takes a tenth of the time of all tests if it looks through their modules again and again, which
# live to the end.
gc.set_threshold(10_000)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_SERVICE:
        # The versions there are not those of constraints.txt, and warn of other things.
        config.addinivalue_line("filterwarnings", "default")
