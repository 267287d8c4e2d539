"""What `padfree::chain` takes of its plain meaning's time, on the chains that fused networks have.

    python -m benchmarks.chain --json chain.json

Each chain is run in turns, in both layouts, one thread: `operator`, `meaning` (the same in torch's operations) and
`again`, which is the meaning a second time: how far its ratio is from 1 is how far others can be trusted. `convolution`
is the depthwise convolution alone, as torch has it.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from padfree.kernels import available, chain, chain_meaning

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (shape, (kernel, stride, padding, the pool's kernel and padding), activation, merge, outputs of the 1x1; 0: none)
SHORTCUT, WIDE, REDUCTION, STEM = (3, 2, 0, 3, 0), (5, 2, 1, 3, 0), (3, 2, 0, 0, 0), (3, 1, 1, 3, 1)
CASES = [
    ((1, 8, 7, 7), SHORTCUT, "relu", "sum", 0),
    ((1, 64, 28, 28), SHORTCUT, "relu", "sum", 0),
    ((1, 64, 112, 112), SHORTCUT, "relu", "sum", 0),
    ((1, 72, 55, 55), WIDE, "relu", "sum", 0),
    ((1, 240, 27, 27), SHORTCUT, "hardswish", "sum", 0),
    ((1, 672, 13, 13), WIDE, "hardswish", "sum", 0),
    ((1, 672, 7, 7), WIDE, "hardswish", "sum", 0),
    ((1, 116, 27, 27), SHORTCUT, "", "norm", 116),
    ((1, 232, 7, 7), SHORTCUT, "", "norm", 232),
    ((1, 96, 112, 112), SHORTCUT, "relu6", "sum", 24),
    ((1, 576, 13, 13), SHORTCUT, "relu6", "sum", 160),
    ((1, 48, 27, 27), REDUCTION, "", "", 80),
    ((1, 16, 112, 112), STEM, "hardswish", "cat", 16),
    ((1, 16, 32, 32), STEM, "hardswish", "cat", 16),
    ((8, 64, 112, 112), SHORTCUT, "relu", "sum", 0),
    ((32, 240, 15, 15), SHORTCUT, "hardswish", "sum", 0),
    ((32, 232, 7, 7), SHORTCUT, "", "norm", 232),
]


def ways(x: torch.Tensor, window: tuple[int, ...], act: str, merge: str, outputs: int) -> dict[str, Any]:
    """A chain's ways to be computed, with an activation ahead of it."""
    kernel, stride, padding, pool, pool_padding = window
    channels = x.shape[1]
    weight, bias = torch.randn(channels, 1, kernel, kernel), torch.randn(channels)
    scale = (torch.rand(channels), torch.randn(channels)) if merge == "norm" else (None, None)
    inputs = 2 * channels if merge == "cat" else channels
    point = (torch.randn(outputs, inputs, 1, 1), torch.randn(outputs)) if outputs else (None, None)
    told = (x, "relu", weight, bias, stride, padding, *scale, act, pool, pool_padding, merge, *point, "relu", "")
    return {
        "operator": lambda: chain(*told),
        "meaning": lambda: chain_meaning(*told),
        "again": lambda: chain_meaning(*told),
        "convolution": lambda: F.conv2d(x, weight, bias, stride, padding, groups=channels),
    }


def measure(shape: tuple[int, ...], case: tuple[Any, ...], layout: str, rounds: int) -> dict[str, Any]:
    """One chain."""
    found = ways(torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]), *case)
    torch.testing.assert_close(found["operator"](), found["meaning"](), rtol=1e-4, atol=1e-3)
    timings = interleaved(found, rounds, seconds=0.02)
    window, act, merge, outputs = case
    return {
        "chain": f"{'x'.join(map(str, shape))}; {', '.join(map(str, window))}; {act}; {merge}; {outputs}",
        "layout": layout,
        "microseconds": {way: round(1e6 * statistics.median(times), 1) for way, times in timings.items()},
        "operator / meaning": ratio(timings, "operator", "meaning")["median"],
        "again / meaning": ratio(timings, "again", "meaning")["median"],
        "operator / convolution": ratio(timings, "operator", "convolution")["median"],
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    heads = [*rows[0]["microseconds"], "operator / meaning", "again / meaning", "operator / convolution"]
    lines = [f"Microseconds on {title(about)}.", ""]
    lines += [f"| map; windows; activation; merge; outputs | layout | {' | '.join(heads)} |", "|" + "---|" * 9]
    for row in rows:
        cells = [f"{time:.1f}" for time in row["microseconds"].values()] + [f"{row[name]:.2f}" for name in heads[4:]]
        lines.append(f"| {row['chain']} | {row['layout']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    if not available():
        parser.exit(1, "no C extension: the operator is its meaning, and there is nothing to measure\n")
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for layout in arguments.layouts:
            for shape, *case in CASES:
                rows.append(measure(shape, tuple(case), layout, arguments.rounds))
                progress(f"{rows[-1]['chain']} {layout}: {rows[-1]['microseconds']}")
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
