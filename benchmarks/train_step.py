"""What a training step costs: forward, backward and SGD, time and peak memory, padding-free over original.

    python -m benchmarks.train_step --json train_step.json

Batch 64 at 32 pixels, one thread, both layouts, in turns. The peak is the most bytes alive at once in the step's own
allocations (activations, gradients, indices), counted by the allocator's profiler events; weights are alive before.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import interleaved, machine, milliseconds, progress, ratio, title, write
from benchmarks.latency import NETWORKS, PAPER, NotHere, build
from padfree.kernels import pool

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step(model: nn.Module, layout: torch.memory_format, batch: int, side: int) -> Callable[[], None]:
    """One optimiser step on a fixed random batch, as a function."""
    model = model.to(memory_format=layout).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def plain_pools() -> Any:
    """Every pool as `F.max_pool2d` computes it, in the block."""
    return mock.patch.object(pool, "_called", F.max_pool2d)


def naive(run: Callable[[], None]) -> Callable[[], None]:
    """The same step with plain max-pools."""

    def plainly() -> None:
        with plain_pools():
            run()

    return plainly


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes alive at once during one step, above what was alive before it."""
    run()  # momentum buffers and the like exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    alive = highest = 0
    for event in _memory_events(profiler.profiler.kineto_results.experimental_event_tree()):
        alive += event
        highest = max(highest, alive)
    return highest


def _memory_events(roots: list[Any]) -> list[int]:
    """Sizes of allocations (positive) and frees (negative) in the order they happened."""
    found: list[tuple[int, int]] = []
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found, key=lambda item: item[0])]


def measure(name: str, layout: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one network in one layout."""
    original, converted = build(name, arguments.side)
    shape = (LAYOUTS[layout], arguments.batch, arguments.side)
    first, second = step(original, *shape), step(converted, *shape)
    runs = {"original": first, "padfree": second, "naive": naive(second)}
    timings = interleaved(runs, arguments.rounds, seconds=0)
    peaks = {variant: peak_bytes(run) for variant, run in runs.items()}
    return {
        "network": name,
        "layout": layout,
        "ms": milliseconds(timings),
        "padfree/original": ratio(timings, "padfree", "original"),
        "padfree/naive": ratio(timings, "padfree", "naive"),
        "peak_bytes": peaks,
        "peak padfree/original": round(peaks["padfree"] / peaks["original"], 4),
        "peak naive/original": round(peaks["naive"] / peaks["original"], 4),
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any], batch: int, side: int) -> str:
    """The Markdown report."""
    lines = [f"One training step, batch {batch} at {side} pixels, on {title(about)}.", ""]
    lines += ["| network | layout | time, padfree / original | time, padfree / naive | peak, padfree / original |"]
    lines[-1] += " peak, naive / original |"
    lines += ["|" + "---|" * 6]
    for row in rows:
        where = f"| {row['network']} | {row['layout']} |"
        if "skipped" in row:
            lines.append(f"{where} left out: {row['skipped']} | | | |")
            continue
        time, plain = row["padfree/original"], row["padfree/naive"]
        lines.append(
            f"{where} {time['median']:.3f} ({time['low']:.3f}-{time['high']:.3f}) | {plain['median']:.3f} "
            f"| {row['peak padfree/original']:.3f} | {row['peak naive/original']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*PAPER, "resnet20"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, choices=(32, 224), default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="every figure, milliseconds and bytes included")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        for layout in arguments.layouts:
            try:
                rows.append(measure(name, layout, arguments))
                shown = (rows[-1]["padfree/original"]["median"], rows[-1]["peak padfree/original"])
                progress(f"{name} {layout}: time {shown[0]:.3f}, peak {shown[1]:.3f}")
            except NotHere as reason:
                rows.append({"network": name, "layout": layout, "skipped": str(reason)})
                progress(f"{name} {layout}: left out: {reason}")
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about, arguments.batch, arguments.side))


if __name__ == "__main__":
    main()
