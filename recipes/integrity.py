"""Checksums of a folder's files: whether what was written is what lies there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

_BLOCK = 1 << 20  # bytes read at once
_STATES = ("random_state", "numpy_random_seed", "torch_manual_seed")  # what Accelerate puts back of random states


@dataclass(frozen=True)
class FileSum:
    """What a file must be.

    Attributes:
        bytes: its length.
        sha256: of its content, in hexadecimal.
    """

    bytes: int
    sha256: str


def file_sum(path: Path) -> FileSum:
    """The length and the checksum of a file."""
    digest, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            length += len(block)
    return FileSum(length, digest.hexdigest())


def text_sum(content: Any) -> str:
    """The checksum of a value that JSON can hold, however it is written down."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, FileSum | int]) -> None:
    """Compare a folder's files with what was written; a length alone says as much as it can.

    Raises:
        OSError: one is missing or cannot be read.
        ValueError: one is another.
    """
    for name, wanted in files.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file")
        length = wanted if isinstance(wanted, int) else wanted.bytes
        if (found := (folder / name).stat().st_size) != length:
            raise ValueError(f"{name} has {found} bytes of {length}")
        if isinstance(wanted, FileSum) and file_sum(folder / name) != wanted:
            raise ValueError(f"{name} has another checksum than when it was written")


def check_readable(path: Path) -> None:
    """Read a file of a state that has no checksum, as far as reading tells that it is whole.

    Raises:
        Exception: whatever reading another content brings about.
    """
    from accelerate.utils.other import load

    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix in (".bin", ".pkl", ".pt"):
        state = load(path, map_location="cpu", weights_only=True)
        if path.name.startswith("random_states") and not (isinstance(state, dict) and set(_STATES) <= state.keys()):
            raise ValueError(f"{path.name} holds no random states")
