"""Writing files: only over plain files, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from padfree.errors import FileError

_finished: ContextVar[list[tuple[Path, Path]] | None] = ContextVar("finished", default=None)


def as_path(path: Any) -> Path:
    """`path` as a `Path`.

    Raises:
        FileError: it is neither a string nor a path, or no file can have that name.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise FileError(f"{path!r} is not the path of a file; pass a string or a pathlib.Path")
    return Path(name)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path to write to, if a file can be there.

    Raises:
        FileError: the folder is missing, or something other than a plain file has that name.
    """
    target = as_path(path)
    for folder in (target.parent, _real(target).parent):
        if not os.path.isdir(folder):
            raise FileError(f"cannot write {target}: there is no folder {folder}")
    if os.path.isdir(target):
        raise FileError(f"cannot write {target}: it is a folder")
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"cannot write {target}: it is a device, a pipe or a socket, not a plain file")
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, else vanishes.

    A file that was there keeps its permissions; of a symbolic link the target is replaced.

    Raises:
        FileError: the place is refused by `check_target`, or the system refuses to write.
    """
    real = _real(check_target(path))
    finished = _finished.get()
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(_mode(real))  # mkstemp makes it private, and so does whoever replaces it
        if finished is None:
            temporary.replace(real)
        else:
            finished.append((temporary, real))
            temporary = None
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Files that `replacing` finishes inside this block take their places together, when it ends well.

    Raises:
        FileError: the system refuses to rename one; those before it are in place then.
    """
    finished: list[tuple[Path, Path]] = []
    token = _finished.set(finished)
    try:
        yield
        for temporary, real in finished:
            try:
                temporary.replace(real)
            except OSError as error:
                raise FileError(f"cannot write {real}: {error.strerror or error}") from error
    finally:
        _finished.reset(token)
        for temporary, _ in finished:
            temporary.unlink(missing_ok=True)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int:
    """The permissions of the file, or those of a new one."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
