"""A process that becomes another one, after promising to die with its parent.

`launch_command(argv, ...)` wraps a command line. Run as a script (`python -I -S launcher.py`, without site-packages),
this file (1) becomes the identity asked for: another user, or a user namespace of its own; (2) asks the kernel for a
signal when the parent ends, even by kill -9 (`PR_SET_PDEATHSIG`, prctl(2)); (3) execs the command, keeping its pid.
"""

# The order matters: changing credentials clears the parent-death signal. The signal comes when the *thread* that
# started the process ends, so a child must be launched from a thread that lives as long as the child is wanted.

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

CANNOT_LAUNCH = 125
"""Exit status when the identity cannot be taken on; 126 and 127 say that the command cannot be executed or found."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLONE_NEWUSER = 0x1000_0000  # linux/sched.h


@dataclass(frozen=True)
class Identity:
    """Who a process runs as. Both None: the user of this process.

    `user` is a (uid, gid) to become. `namespace` is the (uid, gid) that this user appears as inside a new user
    namespace: files keep their owner, and no other user's are touched.
    """

    user: tuple[int, int] | None = None
    namespace: tuple[int, int] | None = None

    @property
    def file_owner(self) -> tuple[int, int]:
        """The (uid, gid) that must own what the process writes, as seen from outside."""
        return self.user or (os.geteuid(), os.getegid())


OURSELVES = Identity()


def launch_command(
    argv: Sequence[str], *, death_signal: int = signal.SIGKILL, identity: Identity = OURSELVES
) -> list[str]:
    """The command line that runs `argv` as `identity`, sent `death_signal` when the thread that started it ends."""
    options = [f"--death-signal={int(death_signal)}", f"--parent={os.getpid()}"]
    if identity.user:
        options.append("--user={}:{}".format(*identity.user))
    if identity.namespace:
        options.append("--namespace={}:{}".format(*identity.namespace))
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *options, "--", *argv]


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split(":")
    return int(first), int(second)


def _enter_namespace(libc: ctypes.CDLL, uid: int, gid: int) -> None:
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot create a user namespace: {os.strerror(code)}")
    # user_namespaces(7): without CAP_SETGID outside, the group map may be written only once setgroups is denied.
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {outer_uid} 1"), ("gid_map", f"{gid} {outer_gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--death-signal", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="pid that the signal waits for")
    parser.add_argument("--user", type=_pair)
    parser.add_argument("--namespace", type=_pair)
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args(arguments)
    libc = ctypes.CDLL(None, use_errno=True)

    try:
        if options.namespace:
            _enter_namespace(libc, *options.namespace)
        if options.user:
            uid, gid = options.user
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        if libc.prctl(PR_SET_PDEATHSIG, options.death_signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    except OSError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return CANNOT_LAUNCH
    if os.getppid() != options.parent:
        # The parent was gone before the kernel knew of our wish.
        return CANNOT_LAUNCH
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these two, and an ignored signal stays ignored across exec
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execv(options.argv[0], options.argv)
    except OSError as error:
        print(f"launcher: cannot execute {options.argv[0]}: {error}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
