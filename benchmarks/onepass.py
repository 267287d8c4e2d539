"""A strided chain with its pool and sum: module by module, and in the one pass of `padfree/onepass.py`.

    python -m benchmarks.onepass --json onepass.json

Each chain that the networks have is run in turns, in both layouts, one thread: `chain` is the depthwise convolution,
its norm and its activation alone, as in the network before the conversion but without padding; `modules` adds the pool
and the sum (in a stem tail the concatenation, the 1x1 convolution and what follows it); `pass` does all of it in one
function. The second table is of 1x1 convolutions behind such a sum, with a norm and an activation: `apart` calls them
after the pass, `together` in it. It shows from how many inputs and weights on that does not pay (`WIDEST` and `LARGEST`
of `padfree.chains`). Both tables give microseconds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from padfree import chains, native, onepass
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
# (shape, kernel, padding, outputs of the 1x1): ShuffleNetV2's, MobileNetV2's
MIXES = [
    ((1, 24, 55, 55), 3, 0, 58),
    ((1, 58, 55, 55), 3, 0, 58),
    ((1, 116, 27, 27), 3, 0, 116),
    ((1, 232, 13, 13), 3, 0, 232),
    ((1, 116, 15, 15), 3, 0, 116),
    ((1, 232, 7, 7), 3, 0, 232),
    ((1, 96, 112, 112), 3, 0, 24),
    ((1, 144, 55, 55), 3, 0, 32),
    ((1, 192, 27, 27), 3, 0, 64),
    ((1, 384, 13, 13), 3, 0, 96),
    ((1, 576, 13, 13), 3, 0, 160),
    ((1, 768, 13, 13), 3, 0, 192),
    ((1, 960, 13, 13), 3, 0, 320),
    ((1, 576, 7, 7), 3, 0, 160),
    ((1, 960, 7, 7), 3, 0, 320),
    ((8, 96, 112, 112), 3, 0, 24),
    ((8, 232, 13, 13), 3, 0, 232),
    ((8, 576, 13, 13), 3, 0, 160),
    ((32, 116, 15, 15), 3, 0, 116),
    ((32, 232, 7, 7), 3, 0, 232),
    ((32, 576, 7, 7), 3, 0, 160),
    ((32, 384, 14, 14), 3, 0, 384),
    ((32, 512, 14, 14), 3, 0, 512),
]


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
    """The three ways of a stem tail."""
    channels = x.shape[1]
    acts = (nn.Hardswish(), nn.Hardswish())
    tail = StemTail(channels, (nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)), acts).eval()
    modules, behind = (tail.conv_dw, tail.norm1, tail.act1), (tail.conv_pw, tail.norm2, tail.act2)
    return {
        "chain": lambda: onepass._called(modules, x),
        "modules": lambda: onepass._called(behind, torch.cat((onepass._called(modules, x), tail.pool(x)), 1)),
        "pass": lambda: tail(x),
    }


def mix(x: torch.Tensor, kernel: int, padding: int, outputs: int) -> dict[str, Any]:
    """Two ways of the 1x1 convolution behind a strided chain."""
    channels = x.shape[1]
    conv = nn.Conv2d(channels, channels, kernel, 2, padding, groups=channels, bias=False)
    chain = nn.Sequential(conv, nn.BatchNorm2d(channels)).eval()
    behind = nn.Sequential(nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()).eval()
    ways, usual = {}, (chains.WIDEST, chains.LARGEST)
    for way, chains.WIDEST, chains.LARGEST in (("apart", 0, 0), ("together", channels, channels * outputs)):
        before, after = (tuple(copy.deepcopy(each)) for each in (chain, behind))
        ways[way] = lambda before=before, after=after: onepass.downsample(x, 3, 0, before, after)
        ways[way]()  # the modules are read
    chains.WIDEST, chains.LARGEST = usual
    return ways


def measure(name: str, layout: str, ways: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds of the ways, and what the last takes of the others, turn by turn."""
    *others, way = ways
    torch.testing.assert_close(ways[way](), ways[others[-1]](), rtol=1e-4, atol=1e-4)
    timings = interleaved(ways, rounds, seconds=0.02)
    microseconds = {way: round(1e6 * statistics.median(times), 1) for way, times in timings.items()}
    ratios = {f"{way} / {other}": ratio(timings, way, other)["median"] for other in reversed(others)}
    return {"chain": name, "layout": layout, "microseconds": microseconds, "ratios": ratios}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    lines, heads = [f"Microseconds on {title(about)}.", ""], [""]
    for row in rows:
        found = ["map; conv; pool; activation", "layout", *row["microseconds"], *row["ratios"]]
        if found != heads:
            heads = found
            lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        cells = [f"{time:.0f}" for time in row["microseconds"].values()]
        cells += [f"{found:.2f}" for found in row["ratios"].values()]
        lines.append(f"| {' | '.join([row['chain'], row['layout'], *cells])} |")
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
    rows: list[dict[str, Any]] = []

    def add(name: str, layout: str, ways: dict[str, Any]) -> None:
        rows.append(measure(name, layout, ways, arguments.rounds))
        progress(f"{name} {layout}: {rows[-1]['microseconds']}")

    with torch.inference_mode():
        for layout in arguments.layouts:
            for shape, kernel, padding, *pool, act in CASES:
                x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
                name = f"{'x'.join(map(str, shape))}; {kernel} s2 p{padding}; {pool[0]} p{pool[1]}; {act}"
                add(name, layout, chain(x, kernel, padding, (pool[0], pool[1]), act))
            for shape in STEMS:
                x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
                add(f"{'x'.join(map(str, shape))}; stem; 3 p1; hardswish", layout, stem(x))
        for layout in arguments.layouts:
            for shape, kernel, padding, outputs in MIXES:
                x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
                name = f"{'x'.join(map(str, shape))}; {kernel} s2 p{padding}; 3 p0; 1x1 to {outputs}; relu"
                add(name, layout, mix(x, kernel, padding, outputs))
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
