"""The demo: a real batch through the whole service on this machine, from a file of prompts to a verified webhook."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cli.client import Client, ServiceError, Submission
from cli.commands.demo_chats import chat, real_models
from cli.commands.following import INTERRUPTED, follow_all
from cli.commands.terminal import out, reports_errors
from cli.commands.webhook_receiver import webhook_receiver
from cli.login_link import login_link
from cli.models import DEMO
from cli.stack import CannotListen, RunningStack, running_stack
from cli.supervisor import ChildFailed, StopRequested
from demo.tasks import Example, mixed_holdout
from jobs.settings import Settings

REQUESTS = 300
SHOWN = 9
WEBHOOK_TIMEOUT = 30.0  # seconds


@reports_errors
def demo(*, keep: bool = False) -> int:
    """Returns 0 where every request came back and the webhook's signature held; stops all that it started.

    With `keep` it goes on serving until Ctrl-C, which then is no failure.
    """
    examples = mixed_holdout(REQUESTS)
    result: int | None = None
    real = real_models()
    try:
        with _workspace() as directory, _service(settings := _settings(directory), real) as stack:
            client = Client(stack.base_url, stack.api_key)
            with (
                stack.supervisor.stopping_explains(ServiceError),
                contextlib.closing(client),
                webhook_receiver(client.webhook_secret()) as receiver,
            ):
                lines = directory / "prompts.jsonl"
                _write(lines, examples)
                out.print(f"[bold]POST /v1/jobs[/bold]  {REQUESTS} prompts that the model never saw in training")
                began = time.monotonic()
                options = (("temperature", "0"), ("max_tokens", "12"))
                job = client.submit(lines, Submission(DEMO, receiver.url, options))
                (job,) = follow_all(client, [job])
                seconds = time.monotonic() - began
                answers = _answers(client, job["id"])
                _show_answers(examples, answers)
                exact = sum(answers.get(place) == example.answer for place, example in enumerate(examples))
                out.print(
                    f"{exact} of {REQUESTS} answers are exact · {REQUESTS / seconds:,.0f} requests/s · "
                    f"{job['usage']['completion_tokens'] / seconds:,.0f} tokens/s generated"
                )
                try:
                    event = receiver.events.get(timeout=WEBHOOK_TIMEOUT)
                except queue.Empty:
                    out.print("[red]No webhook with a valid signature came.[/red]")
                    return 1
                out.print(f"webhook {event['type']} for {event['data']['id']}: signature verified")
                whole = job["status"] == "completed" and len(answers) == REQUESTS
                chatted = not real or chat(client, directory)
                result = 0 if whole and chatted and event["data"]["id"] == job["id"] else 1
            if keep:
                out.print("It goes on serving until Ctrl-C.")
                _show_dashboard(settings, stack)
                stack.supervisor.wait()
            return result
    except StopRequested:
        out.print("Stopped.")
        return INTERRUPTED if result is None else result
    except (CannotListen, ChildFailed) as failure:
        out.print(str(failure), style="red", markup=False)
        return 1


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A directory of its own: the demo leaves nothing behind and disturbs no service of yours."""
    directory = Path(tempfile.mkdtemp(prefix="pagemill-demo-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _settings(directory: Path) -> Settings:
    return Settings(data_dir=directory / "data", port=0, webhook_allow_private=True)


@contextlib.contextmanager
def _service(settings: Settings, real: Sequence[str]) -> Iterator[RunningStack]:
    began = time.monotonic()
    names = [DEMO, *real]
    out.print(f"Starting Postgres, Valkey, the API, the courier and a worker for each of {', '.join(names)} …")
    with running_stack(settings, names, stop_on_signals=True) as stack:
        out.print(f"ready after {time.monotonic() - began:.1f} s: {stack.base_url}")
        _show_dashboard(settings, stack)
        yield stack
        out.print("Stopping everything …")


def _show_dashboard(settings: Settings, stack: RunningStack) -> None:
    # On one line however narrow the terminal is: a link that is broken in two opens nothing.
    out.print(f"watch it in a browser: {login_link(settings, stack)}", markup=False, soft_wrap=True)


def _write(file: Path, examples: Sequence[Example]) -> None:
    with file.open("w") as target:
        for place, example in enumerate(examples):
            target.write(json.dumps({"custom_id": str(place), "prompt": example.prompt}) + "\n")


def _answers(client: Client, job_id: str) -> dict[int, str]:
    """Place → the text that came back for it, of the requests that succeeded."""
    results: list[dict[str, Any]] = [json.loads(line) for line in client.results(job_id)]
    return {
        int(result["custom_id"]): result["response"]["body"]["choices"][0]["text"]
        for result in results
        if result["error"] is None and result["response"]["status_code"] == 200
    }


def _show_answers(examples: Sequence[Example], answers: dict[int, str]) -> None:
    table = Table("prompt", "answer", "", box=None)
    for place, example in enumerate(examples[:SHOWN]):
        answer = answers.get(place, "")
        table.add_row(example.prompt, answer, "✓" if answer == example.answer else f"✗ {example.answer}")
    out.print(table)
