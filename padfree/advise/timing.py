"""Candidates timed in turns, and compared as ratios turn by turn.

Timings on a shared machine drift, so nothing is compared across processes or minutes. What is counted is the process's
CPU time: with one thread that is the wall clock of an otherwise idle machine. Freed memory stays with the process
meanwhile: glibc by default returns large maps to the system and faults them in again, or not, depending on what was
freed before, which moves single figures by a third either way.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

Call = Callable[[], object]
Clock = Callable[[], float]
Timings = dict[str, list[float]]
_MOST_CALLS = 2000  # of one turn


def interleaved(
    candidates: Mapping[str, Call], rounds: int = 15, seconds: float = 0.1, clock: Clock = time.process_time
) -> Timings:
    """Seconds a call of every candidate, one figure a round.

    Args:
        candidates: what to time, by name; the first decides how often each is called in a turn.
        rounds: turns of each candidate.
        seconds: about how long one turn takes.
        clock: what tells the time, in seconds.
    """
    with _memory_kept():
        for run in candidates.values():
            run()
            run()
        once = _turn(next(iter(candidates.values())), 1, clock)
        calls = max(1, min(_MOST_CALLS, int(seconds / max(once, 1e-7))))
        timings: Timings = {name: [] for name in candidates}
        for index in range(rounds):
            order = list(candidates.items())
            for name, run in order[index % len(order) :] + order[: index % len(order)]:
                timings[name].append(_turn(run, calls, clock))
        return timings


def ratio(timings: Timings, name: str, base: str) -> dict[str, float]:
    """Median and quartiles of `name` / `base`, round by round."""
    ratios = sorted(a / b for a, b in zip(timings[name], timings[base], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def milliseconds(timings: Timings) -> dict[str, float]:
    """The median of each candidate."""
    return {name: round(1e3 * statistics.median(times), 4) for name, times in timings.items()}


@contextlib.contextmanager
def _memory_kept() -> Iterator[None]:
    """The allocator of glibc neither maps nor trims in the block, and is at its defaults after it; others stay."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    try:
        libc = ctypes.CDLL(None)
        set_to, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    for name, value in ((mmap_max, 0), (trim_threshold, (1 << 31) - 1), (top_pad, 64 << 20)):
        set_to(name, value)
    try:
        yield
    finally:
        for name, value in ((mmap_max, 1 << 16), (trim_threshold, 128 << 10), (top_pad, 128 << 10)):
            set_to(name, value)
        trim(0)


def _turn(run: Call, calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls
