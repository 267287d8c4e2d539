"""What a command meets outside itself: a stdout that takes nothing more, a signal to end."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator

from padfree.errors import PadfreeError


class Terminated(BaseException):
    """SIGTERM arrived; like an interrupt it passes everything that catches errors."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block with `Terminated`, unless the caller has plans of its own for that signal."""

    def stop(*_: object) -> None:
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Print on stdout: what its encoding lacks is escaped, and a reader who went away is no error.

    Raises:
        PadfreeError: stdout is closed, or takes no more.
    """
    stdout = sys.stdout
    if stdout is None:
        raise PadfreeError("cannot write to stdout: it is closed")
    with contextlib.ExitStack() as stack:
        if isinstance(stdout, io.TextIOWrapper):
            stack.callback(stdout.reconfigure, errors=stdout.errors)
            stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                yield
            finally:
                stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # what is left would fail again at exit
            if not isinstance(error, BrokenPipeError):
                raise PadfreeError(f"cannot write to stdout: {error.strerror or error}") from error
