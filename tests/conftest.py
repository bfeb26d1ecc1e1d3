"""Fixtures for everybody: real databases on real servers (see tests/support/services.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

if "+cpu" in version("torch") or not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd")):
    # Without a GPU, Triton's kernels run in its interpreter; that must be said before anybody imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.rows import Rows, rows_in
from tests.support.services import Services, running_services

# How long an example takes depends on who else uses the machine.
hypothesis_settings.register_profile("pagemill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("pagemill")


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """One Postgres and one Redis for the whole run."""
    with running_services(tmp_path_factory.mktemp("services") / "data") as running:
        yield running


@pytest.fixture
def database_url(services: Services) -> Iterator[str]:
    """A fresh, migrated database."""
    with services.database() as url:
        yield url


@pytest.fixture(scope="session")
def _rows(services: Services) -> Iterator[Rows]:
    with services.database() as url, rows_in(url) as rows:
        yield rows


@pytest.fixture
def rows(_rows: Rows) -> Rows:
    """Puts real rows into a database that is empty but for a model, and acts as a worker does.

    The database is emptied for each test, not made anew: that is ten times as fast.
    """
    _rows.clear()
    return _rows


@pytest.fixture
def empty_database_url(services: Services) -> Iterator[str]:
    """A fresh database without tables."""
    with services.database(migrated=False) as url:
        yield url


@pytest.fixture
def redis_url(services: Services) -> str:
    """An empty Redis database."""
    return services.redis_database()
