"""A process that runs the embedded services until it is told to stop, or killed.

    python -m tests.support.embedded_host DATA_DIR

Prints one line of JSON once both are ready: {"database_url", "redis_url", "pids"}. A refusal goes to stderr, status 3.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

from cli.child_logs import ChildLog
from cli.data_dir import DataDir, DataDirError
from cli.embedded import EmbeddedServiceError, embedded_services
from cli.supervisor import ChildFailed

REFUSED = 3


def main(data_dir: DataDir) -> int:
    try:
        with (
            closing(ChildLog(data_dir.logs)) as log,
            embedded_services(data_dir, log, stop_on_signals=True) as services,
        ):
            ready = {
                "database_url": services.database_url,
                "redis_url": services.redis_url,
                "pids": services.supervisor.pids(),
            }
            sys.stdout.write(json.dumps(ready) + "\n")
            sys.stdout.flush()
            services.supervisor.wait()
    except (DataDirError, EmbeddedServiceError, ChildFailed) as refusal:
        sys.stderr.write(f"{refusal}\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(DataDir(Path(sys.argv[1]))))
