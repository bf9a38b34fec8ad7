"""Ctrl-C and SIGTERM, which clusters end jobs with: both reach all processes of a group, and the first one decides."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def leave_signals_alone(worker: int) -> None:
    """For a loader's workers, which must live until their parent has ended what is under way.

    They end with their parent, which torch watches, or by a SIGTERM from it: torch sends one to a worker that does not
    answer, and Python, at its own end, to all that are left.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS: nothing tells who sent it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_parents_signal, daemon=True).start()


def _end_by_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
