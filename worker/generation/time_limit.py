"""A time limit for Python code that may never return, such as a chat template's loops."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(BaseException):
    """Raised inside the code under the limit. Not an `Exception`, so that the code does not take it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in this thread once the block has run for `seconds`.

    It is raised between two bytecodes: a single call into C that hangs is not interrupted, and is the watchdog's.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()  # of is_over: the exception must not come after the block
    is_over = False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TimeLimitExceeded))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
        # Taken back if it was sent and has not been raised yet.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, None)
