"""What the method itself does to accuracy: stem only, downsampling only, and both, trained from scratch.

    python -m benchmarks.ablation                               # everything: some hours on one core; resumable
    python -m benchmarks.ablation --data photos --seeds 3 --jobs 2
    python -m benchmarks.ablation --markdown docs/ablation.md --picture docs/ablation.png

Small networks of three families (padfree.recipes.small) see 640 batches of 64: SGD, learning rate 0.1, cosine. The
variants of a seed have the source network's initial values, the batches and their augmentation in common, and so their
differences are taken seed by seed. Finished cells are kept in `--json`, and a run that is stopped goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.ablation_page import page, picture
from benchmarks.images import Images, Split, images
from benchmarks.training import RATE, Cell, accuracy, arguments_of, fit, marks, original, predictions, run
from padfree import recipes

FAMILIES = ("resnet", "mobilenetv2", "mobilenetv3")
DATA = ("photos", "mnist5k")
VARIANTS = ("original", "stem-only", "downsampling-only", "padfree")
STEPS, SIDE = 640, 32
ABOUT = "ablation: batches of 64 at 32 pixels, rate 0.1, cosine, weight decay 5e-4"
NOISE, SHIFTS = 0.3, (1, 2, 3, 4)
WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1))
BORDER = 6  # pixels from the middle that bring MNIST's digits, of 20 pixels in 28, to the image's border


def measure(key: Cell, folder: Path) -> Cell:
    """Train one variant of one network, and look at it from all sides."""
    begun = time.process_time()
    data = images(key["data"], SIDE)
    recipe = recipes.load(f"{key['data']}/{key['family']}")
    steps, seed = key["steps"], key["seed"]
    if key["variant"] == "original":
        model, curve = original(recipe, data, steps, seed, folder)
    else:
        model = recipe.build(key["variant"], seed=seed)
        curve = fit(model, data, steps, lr=RATE, seed=seed, marks=marks(steps))
    found = conditions(model, data)
    return {
        "key": key,
        "parameters": sum(item.numel() for item in model.parameters()),
        "curve": curve,
        **found,
        "cpu_s": round(time.process_time() - begun, 1),
        "told": f"{found['clean']:.1f} %",
    }


def conditions(model: torch.nn.Module, data: Images) -> dict[str, float]:
    """Accuracies in percent: `clean` on all test images, and on half of them under each condition.

    `half` is the accuracy of those when nothing is done to them; `kept` says how many keep their class when the window
    moves by one pixel.
    """
    every, part = data.test, data.test.half()
    labels, clean = part.labels, data.window(part)
    generator = torch.Generator().manual_seed(0)
    found = {"clean": accuracy(model, data.window(every), every.labels), "half": accuracy(model, clean, labels)}
    found["noise"] = accuracy(model, clean + NOISE * torch.randn(clean.shape, generator=generator), labels)
    for pixels in SHIFTS:
        moved = [_moved(data, part, pixels * down, pixels * right) for down, right in WAYS]
        found[f"shift{pixels}"] = statistics.fmean(accuracy(model, images, labels) for images in moved)
    if data.name == "photos":
        hidden = clean.clone()
        quarter = data.side // 4
        hidden[..., quarter:-quarter, quarter:-quarter] = 0  # the mean of a standardised image
        found["border"] = accuracy(model, hidden, labels)
    else:
        moved = [data.window(part, BORDER * down, BORDER * right) for down, right in WAYS]
        found["border"] = statistics.fmean(accuracy(model, images, labels) for images in moved)
    before = predictions(model, clean).argmax(1)
    same = [predictions(model, data.window(part, *way)).argmax(1) == before for way in WAYS]
    found["kept"] = 100 * float(torch.stack(same).float().mean())
    return {name: round(value, 3) for name, value in found.items()}


def _moved(data: Images, part: Split, down: int, right: int) -> torch.Tensor:
    """Test images moved by some pixels; what comes in at the border of a photo is its mean, of a digit black."""
    if data.name != "photos":
        return data.window(part, down, right)
    moved = torch.roll(data.window(part), (down, right), (2, 3))
    for axis, step in ((2, down), (3, right)):
        if step:
            moved.narrow(axis, 0 if step > 0 else data.side + step, abs(step)).zero_()
    return moved


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of 64 a run (default: %(default)s)")
    arguments_of(parser, "ablation")
    arguments = parser.parse_args()
    keys = [
        {"data": data, "family": family, "variant": variant, "seed": seed, "steps": arguments.steps}
        for data in arguments.data
        for seed in range(arguments.seeds)
        for family in arguments.families
        for variant in VARIANTS
    ]
    return run(arguments, keys, measure, ABOUT, page, picture)


if __name__ == "__main__":
    sys.exit(main())
