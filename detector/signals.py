"""Ctrl-C and SIGTERM, which clusters end jobs with: both reach all processes of a group, and the first one decides."""

import atexit
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds


def ignoring_signals() -> Callable[[int], None]:
    """A ``worker_init_fn`` for a loader: its workers live until their parent has ended what is under way."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # behind multiprocessing's own handler, so that it runs before that
    return _ignore_signals


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Python sends its daemons a SIGTERM and waits for them, for ever if they ignore it: those are killed."""
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
