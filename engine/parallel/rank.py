"""One rank's process: `python -m engine.parallel.rank FD PARENT`, started by `processes.py`.

It ends with rank 0: by the parent-death signal, even where that one was killed, or when the connection closes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

import torch

from engine.device.collectives import ProcessGroup
from engine.errors import EngineError
from engine.execution.model_runner import ModelRunner, device_of
from engine.parallel.messages import Start
from engine.parallel.processes import CONNECTED, READY

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    fd, parent = map(int, sys.argv[1:])
    _end_with(parent)
    # A service manager signals all processes of a service; rank 0 decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(fd)
    try:
        _serve(connection)
    except (EOFError, ConnectionError):
        return 0
    except EngineError as error:
        connection.send(error.message)
    except Exception as error:
        logger.exception("this rank cannot go on")
        connection.send(f"{type(error).__name__}: {error}")
    return 1


def _serve(connection: Connection) -> None:
    start: Start = connection.recv()
    logging.basicConfig(
        level=start.log_level,
        format=f"%(asctime)s %(levelname)-7s rank {start.rank}: %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    device = device_of(start.config, start.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(start.threads)
    connection.send(READY)
    group = ProcessGroup(start.rendezvous, start.rank, start.config.tensor_parallel_size, device)
    connection.send(CONNECTED)
    runner = ModelRunner.from_pretrained(start.path, start.config, group)
    while True:
        connection.recv().on(runner)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once if it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl") and libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # without waiting for other ranks that may have ended
