"""webhooks listen: a receiver on this machine that verifies what it is sent and prints it."""

from __future__ import annotations

import contextlib
import json
import queue

from cli.client import Client
from cli.commands.following import INTERRUPTED, OK
from cli.commands.terminal import err, out, reports_errors
from cli.commands.webhook_receiver import webhook_receiver
from jobs.settings import Settings


@reports_errors
def listen(*, host: str, port: int, secret: str | None, count: int | None) -> int:
    """Print each verified event, one JSON object a line, until `count` came or Ctrl-C.

    Without a `secret` the service is asked for that of the key's tenant.
    """
    if secret is None:
        with contextlib.closing(Client.from_settings(Settings())) as client:
            secret = client.webhook_secret()
    try:
        with webhook_receiver(secret, host=host, port=port) as receiver:
            err.print(f"listening on {receiver.url}; submit with --webhook {receiver.url}", markup=False)
            printed = 0
            while count is None or printed < count:
                with contextlib.suppress(queue.Empty):
                    out.print_json(json.dumps(receiver.events.get(timeout=1.0)), indent=None, highlight=False)
                    printed += 1
                while receiver.refused:
                    err.print(f"refused: {receiver.refused.popleft()}", style="red", markup=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK
