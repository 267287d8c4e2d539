"""Does a padding-free network lose more to int8 than its original?

    python -m benchmarks.int8                                         # everything: hours on one core; resumable
    python -m benchmarks.int8 --data photos --families mobilenetv3 --seeds 2
    python -m benchmarks.int8 --report --page docs/deploy.md

The networks, data and training of `benchmarks.ablation`: each is trained from scratch, written with
`padfree.export.to_int8_onnx` (ranges read off 512 training images), and run in ONNX Runtime on all test images.
Finished cells are kept in `--json`, and a run that is stopped goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ablation import DATA, FAMILIES, SIDE, STEPS
from benchmarks.deploy_page import write
from benchmarks.images import images
from benchmarks.training import RATE, Cell, accuracy, cells, fit, original, predictions, spread
from padfree import recipes
from padfree.deploy.int8 import decibels
from padfree.export import to_int8_onnx

VARIANTS = ("original", "padfree")
ABOUT = "int8: batches of 64 at 32 pixels, rate 0.1, cosine, weight decay 5e-4"
CALIBRATION, BATCH = 512, 64
BEGIN, END = "<!-- the table of benchmarks.int8 -->", "<!-- end of the table -->"


def measure(key: Cell, folder: Path) -> Cell:
    """Train one variant of one network, and look at it in float32 and in int8."""
    data = images(key["data"], SIDE)
    recipe = recipes.load(f"{key['data']}/{key['family']}")
    if key["variant"] == "original":
        model, _ = original(recipe, data, key["steps"], key["seed"], folder)
    else:
        model = recipe.build(key["variant"], seed=key["seed"])
        fit(model, data, key["steps"], lr=RATE, seed=key["seed"])
    model = model.to(memory_format=torch.contiguous_format).eval()
    test, labels = data.window(data.test), data.test.labels
    mine = predictions(model, test)
    theirs = in_int8(model, data.window(data.train)[:CALIBRATION], test)
    found = {
        "float": accuracy(model, test, labels),
        "int8": round(100 * float((theirs.argmax(1) == labels).float().mean()), 3),
        "decibels": decibels(mine.double(), theirs.double()),
    }
    return {"key": key, **found, "told": "{float:.1f} %, int8 {int8:.1f} %, {decibels:.1f} dB".format(**found)}


def in_int8(model: nn.Module, calibration: Tensor, test: Tensor) -> Tensor:
    """Logits (N, classes) of the network's int8 file."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        to_int8_onnx(model, path, calibration.contiguous().split(BATCH), dynamic_sides=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"input": part.contiguous().numpy()})[0] for part in test.split(BATCH)]
    return torch.cat([torch.from_numpy(part) for part in parts])


def page(found: list[Cell]) -> str:
    """The table, as Markdown: means of the seeds and sample standard deviations."""
    seeds = len({cell["key"]["seed"] for cell in found})
    steps = ", ".join(map(str, sorted({cell["key"]["steps"] for cell in found})))
    lines = [
        f"Test accuracy in percent, {seeds} seed(s), {steps} steps; dB: the power of float32's logits over that of "
        "int8's difference to them.",
        "",
        "| data | network | | float32 | int8 | lost | dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, family in dict.fromkeys((cell["key"]["data"], cell["key"]["family"]) for cell in found):
        for variant in VARIANTS:
            key = {"data": data, "family": family, "variant": variant}
            group = [cell for cell in found if key.items() <= cell["key"].items()]
            if group:
                texts = [spread([cell[what] for cell in group]) for what in ("float", "int8")]
                texts.append(spread([cell["float"] - cell["int8"] for cell in group], 2))
                texts.append(spread([cell["decibels"] for cell in group]))
                name = {"padfree": "padding-free"}.get(variant, variant)
                lines.append(f"| {data} | {family} | {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write the page's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of 64 a run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/int8.json"), metavar="FILE")
    parser.add_argument("--restart", action="store_true", help="measure again what --json holds")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what --json holds")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table between the marks of this page")
    arguments = parser.parse_args()
    keys = [
        {"data": data, "family": family, "variant": variant, "seed": seed, "steps": arguments.steps}
        for seed in range(arguments.seeds)
        for data in arguments.data
        for family in arguments.families
        for variant in VARIANTS
    ]
    if not arguments.report:
        looked_at = functools.partial(measure, folder=arguments.json.parent / "originals")
        cells(keys, looked_at, arguments.json, ABOUT, arguments.jobs, arguments.restart)
    if not arguments.json.is_file():
        raise SystemExit(f"{arguments.json}: nothing was measured yet; leave --report out")
    text = page([cell for cell in json.loads(arguments.json.read_text())["cells"] if cell["key"] in keys])
    if arguments.page:
        write(arguments.page, text, BEGIN, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
