"""Which way to pool is fastest where: the figures behind the constants of `padfree/pooling.py`.

    python -m benchmarks.pool --json pool.json

Each shape that the networks pool is run along every path of `padfree.pooling` in turns, in both layouts, one thread;
`native` is there where the C extension was built, and `--without-extension` shows what is chosen where it was not;
the table gives microseconds, marks the path that `_choose` takes with `*`, and what that costs against the best.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import interleaved, machine, progress, ratio, title, write
from padfree import native, pooling

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PATHS = ("plain", "channels_last", "separable", "native")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORTCUT, STEM, STEM_HALVED, WIDE = (3, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 1)
CASES = [  # (shape, window): what MobileNetV3, GhostNet, ShuffleNetV2 and ParC-MobileNetV2 pool at 224 and at 32
    ((1, 64, 112, 112), SHORTCUT),
    ((1, 96, 112, 112), SHORTCUT),
    ((1, 72, 56, 56), SHORTCUT),
    ((1, 72, 55, 55), WIDE),
    ((1, 240, 27, 27), SHORTCUT),
    ((1, 672, 13, 13), SHORTCUT),
    ((1, 672, 13, 13), WIDE),
    ((1, 16, 112, 112), STEM),
    ((1, 24, 112, 112), STEM_HALVED),
    ((1, 64, 32, 32), SHORTCUT),
    ((1, 72, 32, 32), WIDE),
    ((1, 240, 15, 15), SHORTCUT),
    ((1, 672, 7, 7), SHORTCUT),
    ((1, 672, 7, 7), WIDE),
    ((1, 16, 32, 32), STEM),
    ((1, 16, 16, 16), STEM),
    ((8, 64, 112, 112), SHORTCUT),
    ((8, 240, 27, 27), SHORTCUT),
    ((8, 672, 13, 13), SHORTCUT),
    ((8, 16, 112, 112), STEM),
    ((32, 72, 32, 32), SHORTCUT),
    ((32, 240, 15, 15), SHORTCUT),
    ((32, 672, 7, 7), SHORTCUT),
    ((32, 16, 32, 32), STEM),
]


def measure(
    shape: tuple[int, ...], window: tuple[int, int, int], layout: str, dtype: str, rounds: int
) -> dict[str, Any]:
    """Every path on one map."""
    x = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    paths = {
        "plain": lambda: F.max_pool2d(x, *window),
        "separable": lambda: pooling._separable(x, *window),
    }
    if native.extension is not None and dtype == "float32":
        paths["native"] = lambda: native.max_pool(x, *window)
    if layout == "contiguous":
        paths["channels_last"] = lambda: pooling._through_channels_last(x, *window)
    expected = F.max_pool2d(x, *window)
    for name, path in paths.items():
        if not torch.equal(path(), expected):
            raise AssertionError(f"{name} is wrong at {shape}, {window}, {layout}")
    chosen = pooling._choose(x, *window)
    timings = interleaved({chosen: paths[chosen], **paths}, rounds, seconds=0.02)
    medians = {name: statistics.median(times) for name, times in timings.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "shape": shape,
        "window": window,
        "layout": layout,
        "dtype": dtype,
        "microseconds": {name: round(1e6 * seconds, 1) for name, seconds in medians.items()},
        "chosen": chosen,
        "best": best,
        "chosen/best": ratio(timings, chosen, best)["median"],
        "chosen/plain": ratio(timings, chosen, "plain")["median"],
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    lines = [f"Microseconds on {title(about)}; `*` is the path taken.", ""]
    heads = ["shape", "k, s, p", "layout", "dtype", *PATHS, "taken / plain", "taken / best"]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for name in PATHS:
            figure = row["microseconds"].get(name)
            cells.append("" if figure is None else f"{figure:.0f}{'*' if name == row['chosen'] else ''}")
        where = f"| {'x'.join(map(str, row['shape']))} | {', '.join(map(str, row['window']))} "
        where += f"| {row['layout']} | {row['dtype']} | "
        lines.append(where + " | ".join(cells) + f" | {row['chosen/plain']:.2f} | {row['chosen/best']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-extension", action="store_true", help="as where no C compiler was at hand")
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.without_extension:
        native.extension = None
    rows = []
    with torch.inference_mode():
        for dtype in arguments.dtypes:
            for layout in arguments.layouts:
                for shape, window in CASES:
                    rows.append(measure(shape, window, layout, dtype, arguments.rounds))
                    progress(f"{shape} {window} {layout} {dtype}: {rows[-1]['microseconds']}")
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
