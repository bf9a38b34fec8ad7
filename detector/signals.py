"""Handling of Ctrl-C and SIGTERM, which clusters send to end jobs. Both reach all processes of a group."""

import atexit
import multiprocessing.util  # its exit handler is registered first, so it runs last
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds


def ignore_signals(worker: int) -> None:
    """Keep a loader's worker alive until the parent stops it. Use as ``worker_init_fn``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that ignore SIGTERM. Python would wait for them forever."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    for child in daemons:
        child.terminate()
    for child in daemons:
        child.join(PATIENCE / len(daemons))
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
