"""A sweep's worker that does as it is told; in a module without torch, so that its process starts at once."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path


def work(pipe: Connection, features: bool) -> None:
    """Answer each name with a row; "dies" ends the process, and "sleeps@PATH" makes that file and waits for ever."""
    pipe.send(None)
    while True:
        name, _, path = pipe.recv().partition("@")
        if name == "dies":
            os._exit(7)
        if name == "sleeps":
            Path(path).touch()
            signal.pause()
        pipe.send({"name": name, "status": "full"})
