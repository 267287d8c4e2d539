"""What the benchmarks share: interleaved timing in one process, ratios run by run, the machine's name.

Timings on a shared machine drift, so nothing is compared across processes or minutes: candidates take
turns, each turn gives one ratio, and the median of those ratios is reported with its quartiles. What is
counted is the process's CPU time: with one thread that is the wall clock of an otherwise idle machine.
Freed memory stays with the process: glibc by default returns large maps to the system and faults them in again,
or not, depending on what was freed before, which moves single figures by a third either way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import padfree

Timings = dict[str, list[float]]


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.1) -> Timings:
    """CPU seconds a call of every candidate, one figure a round.

    Args:
        candidates: what to time, by name; the first decides how often each is called in a turn.
        rounds: turns of each candidate.
        seconds: about how long one turn takes.
    """
    _keep_memory()
    for run in candidates.values():
        run()
        run()
    once = _turn(next(iter(candidates.values())), 1)
    calls = max(1, min(2000, int(seconds / max(once, 1e-7))))
    timings: Timings = {name: [] for name in candidates}
    for index in range(rounds):
        order = list(candidates.items())
        for name, run in order[index % len(order) :] + order[: index % len(order)]:
            timings[name].append(_turn(run, calls))
    return timings


@functools.cache
def _keep_memory() -> None:
    """Tell glibc's allocator to neither map nor trim; other allocators are left as they are."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((mmap_max, 0), (trim_threshold, (1 << 31) - 1), (top_pad, 64 << 20)):
            mallopt(name, value)


def _turn(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def ratio(timings: Timings, name: str, base: str) -> dict[str, float]:
    """Median and quartiles of `name` / `base`, round by round."""
    ratios = sorted(a / b for a, b in zip(timings[name], timings[base], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def milliseconds(timings: Timings) -> dict[str, float]:
    """The median of each candidate."""
    return {name: round(1e3 * statistics.median(times), 4) for name, times in timings.items()}


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
