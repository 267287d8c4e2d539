"""A strided chain with its pool and sum: module by module, and in the one pass of `padfree/onepass.py`.

    python -m benchmarks.onepass --json onepass.json

Each chain that the networks have is run in turns, in both layouts, one thread: `chain` is the depthwise convolution,
its norm and its activation alone, as in the network before the conversion but without padding; `modules` adds the pool
and the sum (in a stem tail the concatenation); `pass` does all of it in one function. The table gives microseconds.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from padfree import native, onepass
from padfree.layers import StemTail
from padfree.pooling import add_shortcut, shortcut_pool

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish, "silu": nn.SiLU, "none": nn.Identity}
CASES = [  # (shape, kernel, padding, the pool's kernel and padding, activation), as the paper's networks have them
    ((1, 64, 112, 112), 3, 0, 3, 0, "relu"),
    ((1, 72, 55, 55), 5, 1, 3, 0, "relu"),
    ((1, 144, 55, 55), 5, 1, 3, 0, "silu"),
    ((1, 240, 27, 27), 3, 0, 3, 0, "hardswish"),
    ((1, 672, 13, 13), 5, 1, 3, 0, "hardswish"),
    ((1, 672, 13, 13), 5, 1, 5, 1, "none"),
    ((1, 64, 32, 32), 3, 0, 3, 0, "relu"),
    ((1, 240, 15, 15), 3, 0, 3, 0, "hardswish"),
    ((1, 672, 7, 7), 5, 1, 3, 0, "hardswish"),
    ((8, 64, 112, 112), 3, 0, 3, 0, "relu"),
    ((8, 672, 13, 13), 5, 1, 3, 0, "hardswish"),
    ((32, 64, 32, 32), 3, 0, 3, 0, "relu"),
    ((32, 240, 15, 15), 3, 0, 3, 0, "hardswish"),
    ((32, 672, 7, 7), 5, 1, 3, 0, "hardswish"),
]
STEMS = [(1, 16, 112, 112), (1, 16, 32, 32), (8, 16, 112, 112), (32, 16, 32, 32)]
WAYS = ("chain", "modules", "pass")


def chain(x: torch.Tensor, kernel: int, padding: int, pool: tuple[int, int], act: str) -> dict[str, Any]:
    """The three ways of a strided chain."""
    channels = x.shape[1]
    conv = nn.Conv2d(channels, channels, kernel, 2, padding, groups=channels, bias=False)
    modules = tuple(nn.Sequential(conv, nn.BatchNorm2d(channels), ACTS[act]()).eval())
    return {
        "chain": lambda: onepass._called(modules, x),
        "modules": lambda: add_shortcut(onepass._called(modules, x), shortcut_pool(x, *pool)),
        "pass": lambda: onepass.downsample(x, *pool, modules),
    }


def stem(x: torch.Tensor) -> dict[str, Any]:
    """The three ways of a stem tail's branches."""
    channels = x.shape[1]
    acts = (nn.Hardswish(), nn.Hardswish())
    tail = StemTail(channels, (nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)), acts).eval()
    modules = (tail.conv_dw, tail.norm1, tail.act1)
    return {
        "chain": lambda: onepass._called(modules, x),
        "modules": lambda: torch.cat((onepass._called(modules, x), tail.pool(x)), 1),
        "pass": lambda: onepass.stem_branches(x, modules, tail.pool, (3, 1, 1)),
    }


def measure(name: str, layout: str, ways: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds of the three ways, and their ratios turn by turn."""
    torch.testing.assert_close(ways["pass"](), ways["modules"](), rtol=1e-4, atol=1e-4)
    timings = interleaved(ways, rounds, seconds=0.02)
    microseconds = {way: round(1e6 * statistics.median(times), 1) for way, times in timings.items()}
    ratios = {f"pass/{way}": ratio(timings, "pass", way)["median"] for way in ("modules", "chain")}
    return {"chain": name, "layout": layout, "microseconds": microseconds, **ratios}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    lines = [f"Microseconds on {title(about)}.", ""]
    heads = ["map; conv; pool; activation", "layout", *WAYS, "pass / modules", "pass / chain"]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = " | ".join(f"{row['microseconds'][way]:.0f}" for way in WAYS)
        ratios = f"{row['pass/modules']:.2f} | {row['pass/chain']:.2f}"
        lines.append(f"| {row['chain']} | {row['layout']} | {cells} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    if native.extension is None or native.TABLE is None:
        parser.exit(1, "no C extension, or a torch whose tensors it cannot look into: there is no pass to measure\n")
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for layout in arguments.layouts:
            for shape, kernel, padding, *pool, act in CASES:
                x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
                name = f"{'x'.join(map(str, shape))}; {kernel} s2 p{padding}; {pool[0]} p{pool[1]}; {act}"
                rows.append(measure(name, layout, chain(x, kernel, padding, (pool[0], pool[1]), act), arguments.rounds))
                progress(f"{name} {layout}: {rows[-1]['microseconds']}")
            for shape in STEMS:
                x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
                name = f"{'x'.join(map(str, shape))}; stem; 3 p1; hardswish"
                rows.append(measure(name, layout, stem(x), arguments.rounds))
                progress(f"{name} {layout}: {rows[-1]['microseconds']}")
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
