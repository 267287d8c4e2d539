"""How fast a padding-free network could be at best: its multiply-adds, its bytes, and its convolutions alone.

    python -m benchmarks.floor --json floor.json

`convs` runs nothing but a network's own convolutions, on the maps they get, in turns with the original's: what is left
if pooling, adding, concatenating, norms and activations cost nothing. `free` runs the whole network, but each pass of a
strided chain (depthwise convolution, norm, activation, pool, sum, the norm and activation ahead and the 1x1 convolution
behind where they are part of it; a stem's tail) returns at once with a map of the right shape; `copy` lets it copy as
many bytes as it must read and write. No code for these layers brings a ratio of `benchmarks.latency` below `free`.
`modules` calls the chain's modules one by one, as training does. For `--graphs`,
ONNX Runtime and `torch.compile`, `free` is the network written or compiled without its new pools and sums. The last
table times one 1x1 convolution on the even map of the original and the odd map that follows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from benchmarks.latency import BATCHES, NETWORKS, PAPER, SIDES, Call, NotHere, build, pools, runner
from padfree import native, pooling

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GRAPHS = ("onnxruntime", "compile")
POINTWISE = [(160, 960, 4, 3), (112, 672, 8, 7), (40, 120, 16, 15), (24, 72, 32, 31)]  # in, out, before, after


def counts(model: nn.Module, side: int) -> tuple[float, float]:
    """Multiply-adds of convolutions and linears, and bytes read and written by leaf modules, both in millions."""
    moved = 0

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (inputs[0].numel() + output.numel())

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook) for module in leaves]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() / 2e6, moved / 1e6


def convolutions(model: nn.Module, x: torch.Tensor) -> Call:
    """A function that runs the model's convolutions, one after another, on the maps they get for `x`."""
    calls: list[tuple[nn.Conv2d, torch.Tensor]] = []
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [
        conv.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs[0].clone())))
        for conv in convs
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()

    def run() -> None:
        for conv, image in calls:
            conv(image)

    return run


class IdealPass:
    """A strided chain with its pool and sum that computes nothing: at once, or (`copying`) after moving its bytes."""

    def __init__(self, copying: bool) -> None:
        self.copying = copying
        self.results: dict[tuple[Any, ...], tuple[Any, torch.Tensor, torch.Tensor]] = {}

    def one_pass(self, watch: Any, x: torch.Tensor, *others: Any) -> Any:
        """What the pass gives, made once; a copy moves as much as reading `x` and writing that."""
        key = (id(watch), x.shape, x.stride())
        if key not in self.results:
            made = _ONE_PASS(watch, x, *others)
            if made is None or made is native.CHANGED:
                return made
            maps = [each.uniform_() for each in (made if isinstance(made, tuple) else (made,))]
            moved = torch.empty((x.numel() + sum(each.numel() for each in maps)) // 2)
            self.results[key] = (made, moved, moved.clone())
        made, source, target = self.results[key]
        if self.copying:
            target.copy_(source)
        return made

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """For this long, every pass of a converted network is this one."""
        native.one_pass = self.one_pass
        try:
            yield
        finally:
            native.one_pass = _ONE_PASS


_ONE_PASS = native.one_pass


def whole(original: nn.Module, converted: nn.Module, image: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Padfree over original in eager mode: as it is, as modules called one by one, with an ideal pass."""

    def by(context: Callable[[], contextlib.AbstractContextManager[None]]) -> Call:
        def run() -> None:
            with context():
                converted(image)

        return run

    calls = {
        "original": lambda: original(image),
        "now": lambda: converted(image),
        "modules": by(functools.partial(pools, pooling._pool, pooling._add)),
        "free": by(IdealPass(copying=False)),
        "copy": by(IdealPass(copying=True)),
    }
    with torch.inference_mode():
        timings = interleaved(calls, rounds)
    return {key: ratio(timings, key, "original") for key in calls if key != "original"}


def graphs(original: nn.Module, converted: nn.Module, image: torch.Tensor, runtime: str, rounds: int) -> dict[str, Any]:
    """Padfree over original where a graph is run: as it is, and without pools and sums."""

    def nothing(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
        return x if stride == 1 else x[:, :, :height, :width]

    def left_out() -> contextlib.AbstractContextManager[None]:
        return pools(nothing, lambda y, pooled: y)

    side = image.shape[-1]
    with torch.no_grad():
        calls = dict(runner(original, converted, side, runtime)(image))
        with left_out():  # an ONNX file is written here, a graph is compiled at its first call
            bare = runner(original, converted, side, runtime)(image)["padfree"]

        def free() -> None:
            with left_out():
                bare()

        timings = interleaved({**calls, "free": free}, rounds)
    return {"now": ratio(timings, "padfree", "original"), "free": ratio(timings, "free", "original")}


def graph_table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of the graph runtimes, with geometric means."""
    lines = ["| runtime | side | batch | network | now | free |", "|---|---|---|---|---|---|"]
    for where in dict.fromkeys((row["runtime"], row["side"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["runtime"], row["side"], row["batch"]) == where]
        figures = [(row["network"], row["now"]["median"], row["free"]["median"]) for row in here]
        means = [statistics.geometric_mean(column) for column in zip(*(line[1:] for line in figures), strict=True)]
        for name, now, free in [*figures, ("geometric mean", *means)]:
            lines.append(f"| {' | '.join(map(str, where))} | {name} | {now:.2f} | {free:.2f} |")
    return "\n".join(lines)


def measure(name: str, side: int, batch: int, rounds: int) -> dict[str, Any]:
    """Counts and times of one network."""
    original, converted = build(name, side)
    before, after = counts(original, side), counts(converted, side)
    row: dict[str, Any] = {
        "network": name,
        "side": side,
        "batch": batch,
        "macs": round(after[0] / before[0], 3),
        "bytes": round(after[1] / before[1], 3),
        "million_macs": [round(before[0], 1), round(after[0], 1)],
        "megabytes": [round(before[1], 1), round(after[1], 1)],
    }
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    for layout, memory_format in LAYOUTS.items():
        models = {"original": original, "padfree": converted}
        image = x.contiguous(memory_format=memory_format)
        calls = {key: convolutions(model.to(memory_format=memory_format), image) for key, model in models.items()}
        with torch.inference_mode():
            row[f"convs {layout}"] = ratio(interleaved(calls, rounds, seconds=0.05), "padfree", "original")
        row[f"whole {layout}"] = whole(original, converted, image, rounds)
    return row


def pointwise(rounds: int) -> list[dict[str, Any]]:
    """One 1x1 convolution, batch 1, on both sizes of map: what the arithmetic saves, and what the clock says."""
    rows = []
    for channels, outputs, before, after in POINTWISE:
        for layout, memory_format in LAYOUTS.items():
            conv = nn.Conv2d(channels, outputs, 1, bias=False).to(memory_format=memory_format)
            maps = [torch.randn(1, channels, n, n) for n in (before, after)]
            maps = [image.contiguous(memory_format=memory_format) for image in maps]
            calls = {"before": functools.partial(conv, maps[0]), "after": functools.partial(conv, maps[1])}
            with torch.inference_mode():
                timings = interleaved(calls, rounds, seconds=0.02)
            rows.append(
                {
                    "conv": f"{channels} to {outputs}",
                    "maps": f"{before}x{before} to {after}x{after}",
                    "layout": layout,
                    "macs": round(after**2 / before**2, 3),
                    "time": ratio(timings, "after", "before")["median"],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of the networks, with the geometric mean over those measured at each side and batch."""
    times = [(f"whole {layout}", key) for layout in LAYOUTS for key in ("now", "modules", "copy", "free")]
    times += [(f"convs {layout}", "") for layout in LAYOUTS]
    heads = [kind.replace("whole ", f"{key}, ").replace("convs ", "convs, ") for kind, key in times]
    lines = [f"| network | side | batch | multiply-adds | bytes of leaf modules | {' | '.join(heads)} |"]
    lines.append("|---" * (5 + len(times)) + "|")
    for side, batch in dict.fromkeys((row["side"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["side"], row["batch"]) == (side, batch)]
        cells = [
            [row["macs"], row["bytes"], *((row[kind][key] if key else row[kind])["median"] for kind, key in times)]
            for row in here
        ]
        means = [statistics.geometric_mean(column) for column in zip(*cells, strict=True)]
        for name, figures in [(row["network"], line) for row, line in zip(here, cells, strict=True)] + [
            ("geometric mean", means)
        ]:
            lines.append(f"| {name} | {side} | {batch} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(lines)


def _in_graphs(name: str, side: int, batch: int, runtimes: list[str], rounds: int) -> list[dict[str, Any]]:
    image = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for runtime in runtimes:
        torch.compiler.reset()
        found = graphs(*build(name, side), image, runtime, rounds)
        rows.append({"network": name, "side": side, "batch": batch, "runtime": runtime, **found})
        progress(f"{name} {side} {batch} {runtime}: {found}")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=PAPER)
    parser.add_argument("--sides", nargs="+", type=int, choices=SIDES, default=SIDES)
    parser.add_argument("--batches", nargs="+", type=int, help="default: those of benchmarks.latency")
    parser.add_argument("--graphs", nargs="*", choices=GRAPHS, default=[], help="these runtimes alone")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = machine()
    rows = []
    for side in arguments.sides:
        for batch in arguments.batches or BATCHES[side]:
            for name in arguments.networks:
                try:
                    if arguments.graphs:
                        rows += _in_graphs(name, side, batch, arguments.graphs, arguments.rounds)
                        continue
                    rows.append(measure(name, side, batch, arguments.rounds))
                    progress(f"{name} {side} {batch}: {rows[-1]}")
                except NotHere as reason:
                    progress(f"{name} {side}: left out: {reason}")
    print(f"Padding-free over original on {title(about)}.\n\n{graph_table(rows) if arguments.graphs else table(rows)}")
    if arguments.graphs:
        write({"machine": about, "graphs": rows}, arguments.json)
        return
    points = pointwise(arguments.rounds)
    print("\n| 1x1 conv, batch 1 | maps | layout | multiply-adds | time |\n|---|---|---|---|---|")
    for point in points:
        where = f"| {point['conv']} | {point['maps']} | {point['layout']} "
        print(f"{where}| {point['macs']:.2f} | {point['time']:.2f} |")
    write({"machine": about, "rows": rows, "pointwise": points}, arguments.json)


if __name__ == "__main__":
    main()
