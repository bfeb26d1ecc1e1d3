"""`pagemill up`: the whole service in the foreground, until a signal comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.data_dir import DataDirError
from cli.embedded import EmbeddedServiceError
from cli.first_key import UnusableKey
from cli.login_link import LINK_SECONDS, login_link
from cli.stack import CannotListen, RunningStack, running_stack
from cli.supervisor import ChildFailed, StopRequested
from jobs.database import UnsupportedDatabase
from jobs.settings import Settings


def up(settings: Settings, model_names: Sequence[str]) -> int:
    """Run until SIGINT, SIGTERM or SIGHUP, then stop everything; a second signal does not wait for work to finish.

    Returns the exit code: 0 after a stop that was asked for, 1 where something cannot start.
    """
    try:
        with running_stack(
            settings, model_names, stream=sys.stdout, colour=sys.stdout.isatty(), stop_on_signals=True
        ) as stack:
            print(_greeting(stack, login_link(settings, stack)), flush=True)
            stack.supervisor.wait()
    except StopRequested:
        pass
    except (CannotListen, ChildFailed, DataDirError, EmbeddedServiceError, UnsupportedDatabase, UnusableKey) as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    return 0


def _greeting(stack: RunningStack, link: str) -> str:
    return f"""
Pagemill serves on {stack.base_url} (API reference: {stack.base_url}/docs)
Open               {link}
                   (once, within {LINK_SECONDS // 60} minutes; later, log in with the key)
The key is         {stack.api_key}
Logs are in        {stack.logs}
Ctrl-C stops it.
"""
