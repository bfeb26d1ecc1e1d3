"""The whole service with the demo model, as clients find it: one for all that a process runs of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from cli.models import DEMO
from cli.stack import RunningStack, running_stack
from jobs.settings import Settings
from tests.support.processes import PATIENCE


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("stack") / "data",
        port=0,
        lease=4,
        fence_after=3,
        heartbeat_interval=1,
        sweep_interval=1,
        webhook_allow_private=True,
    )
    with running_stack(settings, [DEMO]) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0, timeout=PATIENCE) as made:
        yield made
