"""A job of 2,000 lines over HTTP through the whole service, with the demo model, while its worker is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

from cli.client import Client, Submission
from cli.commands.webhook_receiver import webhook_receiver
from cli.models import DEMO
from cli.stack import running_stack
from demo.tasks import mixed_holdout
from jobs.settings import Settings
from tests.oracle import check
from tests.processes import PATIENCE, await_condition

LINES = 2000


def test_kill_9_of_the_worker_during_2000_lines(tmp_path: Path) -> None:
    problems = mixed_holdout(600)
    lines = tmp_path / "lines.jsonl"
    with lines.open("w") as file:
        for place in range(LINES):
            prompt = problems[place % len(problems)].prompt
            file.write(
                json.dumps({"custom_id": str(place), "prompt": prompt, "temperature": 0, "max_tokens": 12}) + "\n"
            )
    settings = Settings(
        data_dir=tmp_path / "data",
        port=0,
        lease=4,
        fence_after=3,
        heartbeat_interval=1,
        sweep_interval=1,
        webhook_allow_private=True,
    )
    with (
        running_stack(settings, [DEMO]) as stack,
        contextlib.closing(Client(stack.base_url, stack.api_key)) as client,
        webhook_receiver(client.webhook_secret()) as receiver,
    ):
        job = client.submit(lines, Submission(DEMO, webhook_url=receiver.url))
        await_condition(lambda: client.job(job["id"])["last_seq"] >= 200, "200 results", timeout=250)
        before = [json.loads(line) for line in client.results(job["id"])]
        os.kill(stack.pids()["worker"], signal.SIGKILL)
        await_condition(lambda: client.job(job["id"])["status"] == "completed", "the end of the job", timeout=300)
        results = [json.loads(line) for line in client.results(job["id"])]
        event = receiver.events.get(timeout=PATIENCE)
        check(stack.database_url)

    assert [result["seq"] for result in results] == list(range(1, LINES + 1))
    assert sorted(int(result["custom_id"]) for result in results) == list(range(LINES))
    # A reader that resumes never sees a line change or come twice.
    assert results[: len(before)] == before
    texts = {int(r["custom_id"]): r["response"]["body"]["choices"][0]["text"] for r in results}
    exact = sum(texts[place] == problems[place % len(problems)].answer for place in range(LINES))
    assert exact >= 0.99 * LINES
    assert event["type"] == "job.completed"
    assert event["data"]["id"] == job["id"]
