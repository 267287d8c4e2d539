"""A limit for work that cannot be asked to stop: exporters may take hours over free sides."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from padfree.errors import PadfreeError

T = TypeVar("T")
_LONGEST = 10 * 365 * 86400.0  # seconds; threads do not wait for ever longer


class _TimeUp(BaseException):
    """Raised in the thread that works; like an interrupt it passes everything that catches errors."""


class Stage:
    """What is being done, for the message of a limit that runs out.

    Args:
        text: at first.
    """

    def __init__(self, text: str) -> None:
        self.text = text


def check_limit(seconds: float | None) -> None:
    """Refuse what is no length of time.

    Raises:
        PadfreeError: it is neither None nor a positive number.
    """
    numeric = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (numeric and seconds > 0):
        raise PadfreeError(f"time_limit is {seconds!r}; it takes a positive number of seconds, or None for no limit")


def limited(seconds: float | None, what: str, stage: Stage, advice: str, work: Callable[[], T]) -> T:
    """Do some work, and end it where it takes longer, as soon as the interpreter runs a line of Python again.

    A thread waits, and raises an exception in the one that works (`PyThreadState_SetAsyncExc`): signals reach the main
    thread alone, and not on every system. It takes a function, since an exception that arrives between the end of a
    `with` block and what closes it would escape.

    Args:
        seconds: None for no limit.
        what: the work, as the subject of a sentence.
        stage: its `text` says what was being done.
        advice: what to do about it.
        work: what is done; may clean up after any exception.

    Raises:
        PadfreeError: the time is up.
    """
    check_limit(seconds)
    if seconds is None:
        return work()
    worker, done, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def watch() -> None:
        if done.wait(min(seconds, _LONGEST)):
            return
        with lock:  # either the work has ended, or it has not when the exception is set
            if not done.is_set():
                _raise_in(worker, _TimeUp)

    try:
        try:
            threading.Thread(target=watch, name="padfree time limit", daemon=True).start()
            return work()
        finally:
            with lock:
                done.set()  # a function of Python's: an exception that was set before is raised here at the latest
    except _TimeUp:
        done.set()
        raise PadfreeError(f"{what} took longer than {seconds:g} s, while {stage.text}; {advice}") from None


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    # never with NULL, which takes an exception back: CPython 3.11 then looks for one forever, and hangs in profilers
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
