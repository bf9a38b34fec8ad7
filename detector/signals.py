"""Ctrl-C and SIGTERM, which clusters end jobs with: both reach all processes of a group, and the first one decides."""

import atexit
import multiprocessing
import multiprocessing.util  # whose own handler at exit, registered by now, runs after ours
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def leave_signals_alone(worker: int) -> None:
    """For a loader's workers, which must live until their parent has ended what is under way; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python would send its daemons a SIGTERM, which those above ignore, and wait for them for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM raises ``KeyboardInterrupt``, unless it is ignored or handled already."""
    in_main = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
