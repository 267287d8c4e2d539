"""One cell of `benchmarks.deploy`, in a process of its own: a runtime may crash, and keeps its threads.

    python -m benchmarks.deploy_cell '{"network": "ghostnet", "side": 224, "runtime": "ncnn", "bits": "fp32"}' cell.json

Original and padding-free take turns, and beside them the original once more, built again (the control). Sessions are
built several times: two of the same file differ by where they lie in memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.clock import Timings, interleaved, machine, milliseconds, progress, ratio
from benchmarks.deploy_runtimes import RUNTIMES, Ready, Session, prepared
from benchmarks.latency import build

Cell = dict[str, Any]
FORMS = ("original", "padfree")
CALIBRATION = 32  # images for int8; the weights are random


def measure(key: Cell, builds: int, rounds: int, seconds: float) -> Cell:
    """The figures of a cell.

    Args:
        key: network, side, runtime, bits and, but for the whole padding-free form, `form`: downsampling-only.
        builds: how often every session is built.
        rounds: turns of each in one build.
        seconds: about how long a turn takes.

    Returns:
        the key with `size` (bytes), `difference` (largest, of the largest output), `ms`, `ratio` and `control`; or with
        `failed`, the reason for each form that does not come so far.
    """
    side = key["side"]
    networks = dict(zip(FORMS, build(key["network"], side, key.get("form", "padfree")), strict=True))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 3, side, side, generator=generator) for count in (1, CALIBRATION - 1)]
    about = {"machine": machine(), "versions": versions(RUNTIMES[key["runtime"]].packages)}
    cell: Cell = {"key": key, **about, "size": {}, "difference": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        ready: dict[str, Ready] = {}
        for name, model in networks.items():
            try:
                ready[name] = prepared(key["runtime"], model, images, Path(folder) / name, key["bits"])
                cell["size"][name] = ready[name].size
                cell["difference"][name] = difference(ready[name], model, images[0])
            except Exception as error:  # of any of the libraries
                cell["failed"][name] = first(error)
                progress(f"{name}: {error}")
        if not cell["failed"] and all(item.start for item in ready.values()):
            timings = timed(ready, images[0], builds, rounds, seconds)
            cell["ms"] = milliseconds(timings)
            cell["ratio"], cell["control"] = (ratio(timings, name, "original") for name in ("padfree", "control"))
    return cell


def difference(ready: Ready, model: nn.Module, image: torch.Tensor) -> float | None:
    """The largest difference to the model's own output, of its largest; None where nothing runs."""
    if ready.start is None:
        return None
    with torch.no_grad():
        mine, theirs = model(image).double(), ready.start()(image).double()
    if mine.numel() != theirs.numel():
        raise RuntimeError(f"its output has {theirs.numel()} numbers, and the network's {mine.numel()}")
    return float((mine.reshape(-1) - theirs.reshape(-1)).abs().max() / mine.abs().max())


def timed(ready: dict[str, Ready], image: torch.Tensor, builds: int, rounds: int, seconds: float) -> Timings:
    """Seconds a call of each form and of the control, of all builds together."""
    found: Timings = {name: [] for name in (*FORMS, "control")}
    for number in range(builds):
        order = list(found)[:: -1 if number % 2 else 1]  # what is built first lies elsewhere than what is built last
        sessions: dict[str, Session] = {}
        for name in order:
            start = ready["original" if name == "control" else name].start
            assert start is not None
            sessions[name] = start()
        calls = {name: functools.partial(session, image) for name, session in sessions.items()}
        with torch.no_grad():
            for name, times in interleaved(calls, rounds, seconds).items():
                found[name] += times
    return found


def first(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of the runtime's packages, by the names that they are installed by."""
    names = [package.replace("_", "-") for package in packages]
    return {name: importlib.metadata.version(name) for name in names}


def main() -> int:
    """Measure one cell and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("key", type=json.loads)
    parser.add_argument("out", type=Path)
    parser.add_argument("--builds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.05)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # a runtime that counts processors finds one
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cell = measure(arguments.key, arguments.builds, arguments.rounds, arguments.seconds)
    arguments.out.write_text(json.dumps(cell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
