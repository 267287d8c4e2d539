"""What the benchmarks share: timing in turns (`padfree.advise.timing`), the machine's name, progress, JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import padfree
from padfree.advise.timing import Timings, interleaved, milliseconds, ratio

__all__ = ["Timings", "interleaved", "machine", "milliseconds", "progress", "ratio", "title", "write"]


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, instruction set, versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "padfree": padfree.__version__,
    }


def title(about: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{about['cpu']} ({about['capability']}), {about['cores']} cores, {about['threads']} thread(s), "
        f"torch {about['torch']}"
    )


def progress(text: str) -> None:
    """One line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def write(content: object, path: str | None) -> None:
    """Write JSON to `path`, if there is one."""
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
