"""One process at a time in a run's folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .checkpoints import RunError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep other processes out of it; the system frees it however this one ends.

    Raises:
        RunError: another process is in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a")
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}; give another --out") from error
    with handle:  # the file stays: were it removed, two processes could lock two files of one name
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(f"{folder} is in use by another run; wait for its end, or give another --out") from error
        except OSError:
            pass  # a file system without locks
        yield


def _lock(handle: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # flock would be passed on to loading processes, which outlive a killed run by some seconds
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
