"""As root, run a command where user namespaces are forbidden, as they are in most containers.

    python -m tests.support.without_namespaces COMMAND ...

The command runs in a user namespace that maps every user to itself and whose own limit of further namespaces is zero:
to it, root is root, and `unshare` fails as it does under Docker's seccomp profile (with ENOSPC in place of EPERM).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from cli.launcher import CLONE_NEWUSER

EVERY_ID = "0 0 4294967295"


def main(argv: list[str]) -> None:
    ourselves = os.getpid()
    entered, mapped = os.pipe(), os.pipe()
    if os.fork() == 0:
        # The helper stays outside, where it may write a map of more than one id.
        os.read(entered[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{ourselves}/{name}").write_text(EVERY_ID)
        os.write(mapped[1], b".")
        os._exit(0)
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0:
        sys.exit("this machine forbids user namespaces already")
    os.write(entered[1], b".")
    os.read(mapped[0], 1)
    os.wait()
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
