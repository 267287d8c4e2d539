"""The line on stderr that says what a command is doing, and for how long: on a terminal, and nowhere else.

A command that takes seconds says so while it lasts, and leaves nothing behind. Other code may write to stderr meanwhile
(the bar of a download, warnings): the line makes way, and comes back once the cursor is at the beginning of a line. In
a pipe there is no such line, and what a library draws there with control characters becomes plain lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

Tell = Callable[[str], None]
_EVERY = 0.5  # seconds between two looks
_SEQUENCES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])|[\x00-\x08\x0b-\x1f\x7f]")


def silent(text: str) -> None:
    """Tell nobody."""


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal whose lines can be drawn again."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


class Status:
    """What is being done, on one line of stderr, while the block lasts; called with a text, it says that from then on.

    Args:
        shown: False for no line; what others write in a pipe is made plain all the same.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._stream: _Shared | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._text, self._began = "", 0.0

    def __call__(self, text: str) -> None:
        """Say from now on that this is being done; "" for nothing."""
        self._text, self._began = " ".join(text.split()), time.monotonic()

    def __enter__(self) -> Status:
        if sys.stderr is None:
            return self
        self._stream = _Shared(sys.stderr)
        sys.stderr = self._stream
        if self._shown and self._stream.drawable:
            self._thread = threading.Thread(target=self._tick, name="status line", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._stream is None:
            return
        if sys.stderr is self._stream:
            sys.stderr = self._stream.stream
        if self._thread is not None:
            self._thread.join()
        self._stream.close_line()

    def _tick(self) -> None:
        assert self._stream is not None
        while not self._ended.wait(_EVERY):
            text, seconds = self._text, int(time.monotonic() - self._began)
            if text and not self._stream.draw(f"{text} ... {lasting(seconds)}"):
                return


def lasting(seconds: int) -> str:
    """A length of time: "59 s", "1 min 5 s"."""
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60} s"


class _Shared:
    """stderr with a line of our own on it, which gives way to what others write.

    Args:
        stream: the true one.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.drawable = on_terminal(stream)
        self._lock, self._process = threading.RLock(), os.getpid()
        self._drawn = 0  # characters of our line that are on the screen
        self._free = True  # the cursor is at the beginning of a line
        self._pending = ""  # in a pipe: a line that has not ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """What others write."""
        if os.getpid() != self._process:  # a forked process has no line, and may have been born with the lock held
            return self.stream.write(text)
        with self._lock:
            if self.drawable:
                self._erase()
                self.stream.write(text)
                self._free = text.endswith(("\n", "\r", "\x1b[K")) if text else self._free
            else:
                *lines, self._pending = (self._pending + text).split("\n")
                self.stream.write("".join(f"{plain(line)}\n" for line in lines))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one after another."""
        for line in lines:
            self.write(line)

    def draw(self, text: str) -> bool:
        """Put our line on the screen, if nobody has begun one; False where that cannot be done any more."""
        with self._lock:
            if not self._free:
                return True
            try:
                shown = text[: _columns(self.stream) - 1]
                self.stream.write(f"\r{shown.ljust(self._drawn)}\r{shown}")
                self.stream.flush()
            except (OSError, ValueError):  # nobody reads stderr any more
                return False
            self._drawn = len(shown)
        return True

    def close_line(self) -> None:
        """Take our line off the screen, and write what others had begun."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._erase()
            if plain(self._pending):
                self.stream.write(f"{plain(self._pending)}\n")
            self._pending = ""
            self.stream.flush()

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0


def plain(line: str) -> str:
    """What a terminal would show of a line in the end, without control characters."""
    parts = [part for part in _SEQUENCES.sub(lambda found: "\r" if found[0] == "\r" else "", line).split("\r") if part]
    return parts[-1].rstrip() if len(parts) > 1 else "".join(parts)


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or shutil.get_terminal_size().columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
