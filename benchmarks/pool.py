"""What `padfree.kernels.max_pool` takes of `F.max_pool2d`'s time, on the maps that networks pool.

    python -m benchmarks.pool --json pool.json

Each shape is run both ways in turns, in both layouts, one thread; the table gives microseconds and their ratio. Where
the C extension is missing both are one function.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from padfree import kernels

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHORTCUT, STEM, STEM_HALVED, WIDE = (3, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 1)
CASES = [  # (shape, window): what MobileNetV3, GhostNet, ShuffleNetV2 and ParC-MobileNetV2 pool at 224 and at 32
    ((1, 64, 112, 112), SHORTCUT),
    ((1, 72, 55, 55), WIDE),
    ((1, 240, 27, 27), SHORTCUT),
    ((1, 672, 13, 13), WIDE),
    ((1, 16, 112, 112), STEM),
    ((1, 24, 112, 112), STEM_HALVED),
    ((1, 64, 32, 32), SHORTCUT),
    ((1, 240, 15, 15), SHORTCUT),
    ((1, 672, 7, 7), WIDE),
    ((1, 16, 32, 32), STEM),
    ((8, 64, 112, 112), SHORTCUT),
    ((8, 672, 13, 13), SHORTCUT),
    ((32, 240, 15, 15), SHORTCUT),
    ((32, 16, 32, 32), STEM),
]


def measure(shape: tuple[int, ...], window: tuple[int, int, int], layout: str, rounds: int) -> dict[str, Any]:
    """Both ways on one map."""
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    ways = {"operator": lambda: kernels.max_pool(x, *window), "torch": lambda: F.max_pool2d(x, *window)}
    if not torch.equal(ways["operator"](), ways["torch"]()):
        raise AssertionError(f"the operator is wrong at {shape}, {window}, {layout}")
    timings = interleaved(ways, rounds, seconds=0.02)
    return {
        "shape": shape,
        "window": window,
        "layout": layout,
        "microseconds": {name: round(1e6 * statistics.median(times), 1) for name, times in timings.items()},
        "ratio": ratio(timings, "operator", "torch")["median"],
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    lines = [f"Microseconds on {title(about)}; {kernels.describe()}.", ""]
    lines += ["| shape | k, s, p | layout | operator | torch | operator / torch |", "|" + "---|" * 6]
    for row in rows:
        shape, window = "x".join(map(str, row["shape"])), ", ".join(map(str, row["window"]))
        figures = " | ".join(f"{row['microseconds'][name]:.0f}" for name in ("operator", "torch"))
        lines.append(f"| {shape} | {window} | {row['layout']} | {figures} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for layout in arguments.layouts:
            for shape, window in CASES:
                rows.append(measure(shape, window, layout, arguments.rounds))
                progress(f"{shape} {window} {layout}: {rows[-1]['microseconds']}")
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
