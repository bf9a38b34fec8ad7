"""Handling of Ctrl-C and of SIGTERM, with which clusters end jobs. Both reach all processes of a group."""

import atexit
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds


def ignoring_signals() -> Callable[[int], None]:
    """Return a ``worker_init_fn`` for a loader. Its workers ignore the signals, and live until the parent stops."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # registered after multiprocessing's handler, so it runs before that
    return _ignore_signals


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the workers that ignore SIGTERM. Python would wait for them forever."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    for child in daemons:
        child.terminate()
    until = time.monotonic() + PATIENCE
    for child in daemons:
        child.join(max(until - time.monotonic(), 0))
        if child.is_alive():
            child.kill()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt``, unless it is ignored or handled already."""
    in_main = threading.current_thread() is threading.main_thread()  # only the main thread may handle signals
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
