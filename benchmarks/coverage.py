"""Every model of timm, torchvision and bsconv through padfree, on meta tensors.

python -m benchmarks.coverage                    # all of it; resumable, 2 processes
python -m benchmarks.coverage --sample 60 --seed 1
python -m benchmarks.coverage --fixed            # the sample that covers every pattern, without feature extractors;
                                                 # writes no tables

Each model is measured in a worker process: one that dies or takes too long costs its own row and nothing else.
Finished rows are kept in benchmarks/.coverage-cache, so a run that is stopped goes on where it was, as long as
padfree's code is the same; `--fresh` begins anew. A whole run writes docs/coverage.md and docs/coverage.csv. The exit
status is 1 when padfree crashed, broke a model, changed old keys, took too long, or converted a classifier and its
feature extractor to networks that do not share weights.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.catalogue import SAMPLE, all_sources
from benchmarks.measure import Result, measure
from benchmarks.tables import FAULTS, misfits, totals, write_tables

ROOT = Path(__file__).parent.parent
CACHE = Path(__file__).parent / ".coverage-cache"
PROCESSES = 2
STARTING = 120.0  # seconds a worker may take to import its libraries, on top of its first model's time


@dataclass
class Worker:
    """A process that measures the names it is sent, one at a time."""

    process: Any
    pipe: Connection
    name: str = ""
    since: float = 0.0
    ready: bool = False

    @classmethod
    def start(cls, features: bool) -> Worker:
        """A fresh one; spawned, so that nothing of this process goes along."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, features), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, name: str) -> None:
        """Let it measure a model."""
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def stop(self) -> None:
        """End it: by itself if it waits for a name, at once if it is at work."""
        self.pipe.close()
        if not self.name:
            self.process.join(STARTING)
        self.process.kill()
        self.process.join()


def _work(pipe: Connection, features: bool) -> None:
    import torch

    torch.set_num_threads(1)
    gc.set_threshold(100_000, 20, 100)  # meta tensors come and go by the million; a seventh of the time was collection
    pipe.send(None)  # ready: importing torch is not the first model's time
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(name, features=features).to_dict())


def sweep(
    names: Sequence[str], timeout: float, processes: int = PROCESSES, *, features: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of the named models in the order they finish.

    Args:
        names: sources such as "timm:resnet18".
        timeout: seconds one model may take.
        processes: how many are measured at once.
        features: whether the converted `features_only` form is compared with the classifier too.
    """
    waiting = list(reversed(names))
    workers = [Worker.start(features) for _ in range(min(processes, len(names)))]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while busy := [worker for worker in workers if worker.name]:
            ready = wait([worker.pipe for worker in busy], timeout=1)
            for index, worker in enumerate(workers):
                if not worker.name:
                    continue
                row = _collect(worker, worker.pipe in ready, timeout)
                if row is None:
                    continue
                yield row
                if worker.process.exitcode is not None or row["status"] == "timeout":
                    worker.stop()
                    worker = workers[index] = Worker.start(features)
                worker.name = ""
                if waiting:
                    worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.stop()


def _collect(worker: Worker, ready: bool, timeout: float) -> dict[str, Any] | None:
    """The row of a worker that is done, dead or late; None while it works."""
    seconds = round(time.monotonic() - worker.since, 2)
    if ready:
        try:
            row: dict[str, Any] | None = worker.pipe.recv()
            worker.ready, worker.since = True, time.monotonic()
            return row
        except EOFError:
            worker.process.join()
            why = f"the process died with exit status {worker.process.exitcode}"
            return Result(worker.name, "crash", seconds=seconds, reason=why).to_dict()
    if seconds > (timeout if worker.ready else timeout + STARTING):
        return Result(worker.name, "timeout", seconds=seconds, reason=f"over {timeout:g} seconds").to_dict()
    return None


def _fingerprint() -> str:
    """Of the code that rows depend on, so that rows of other code are not taken for its own."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "padfree").rglob("*.py"), Path(__file__).parent / "measure.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _remembered(path: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            rows[row["name"]] = row
    return rows


def run(names: Sequence[str], cache: Path, timeout: float, *, features: bool = True) -> list[dict[str, Any]]:
    """Sweep with a progress bar, going on from `cache`; rows in the order of `names`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rows = _remembered(cache)
    left = [name for name in names if name not in rows]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("coverage", total=len(names), completed=len(names) - len(left))
        for row in sweep(left, timeout, features=features):
            rows[row["name"]] = row
            cache.parent.mkdir(exist_ok=True)
            with cache.open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.update(task, advance=1, description=f"{row['status']:>8} {row['name']}")
            if row["status"] in FAULTS or misfits(row):
                told = row["shared_keys"] if misfits(row) else row["reason"]
                progress.console.print(f"{row['status']}: {row['name']}: {told}", markup=False)
    return [rows[name] for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep; 1 if padfree crashed, broke a model or changed old keys, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="N models drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default 0)")
    parser.add_argument("--fixed", action="store_true", help="the fixed sample that covers every pattern")
    parser.add_argument("--names", nargs="+", metavar="SOURCE", help='these models, such as "timm:resnet18"')
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs measured")
    parser.add_argument("--timeout", type=float, default=400, metavar="SECONDS", help="for one model (default 400)")
    arguments = parser.parse_args(argv)
    names = list(SAMPLE) if arguments.fixed else arguments.names or all_sources()
    if arguments.sample is not None:
        names = sorted(random.Random(arguments.seed).sample(names, min(arguments.sample, len(names))))
    whole = not (arguments.fixed or arguments.names or arguments.sample is not None)
    cache = CACHE / f"{_fingerprint()}{'-fixed' if arguments.fixed else ''}.jsonl"
    if arguments.fresh:
        cache.unlink(missing_ok=True)
    begun = time.monotonic()
    try:
        rows = run(names, cache, arguments.timeout, features=not arguments.fixed)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(totals(rows)))
    print(f"{time.monotonic() - begun:.0f} seconds")
    if whole:
        write_tables(rows, ROOT / "docs")
    else:
        for row in rows:
            print(f"{row['status']:>8}  {row['name']}  {row['reason']}")
    return int(any(row["status"] in FAULTS or misfits(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
