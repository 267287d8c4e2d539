"""From a trained network to its padding-free form: what is kept before any training, and what fine-tuning regains.

    python -m benchmarks.warm_start                                  # everything: hours on one core; resumable
    python -m benchmarks.warm_start --sets photos32 --seeds 2 --jobs 2
    python -m benchmarks.warm_start --markdown docs/warm-start-figures.md --picture docs/warm-start.png

A network is trained on real images that come inside packages, converted, and looked at before any further training:
fresh layers (the paper's), fresh layers and norms measured again, `init="preserve"`, and `padfree.calibrate` on 20
unlabelled training batches of 64, on images of the same side and on those that give the last map back. Controls show
what the loss is made of. Then all are fine-tuned alike, and so is the original. Finished cells are kept in `--json`,
and a run that is stopped goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from padfree.recipes import Recipe, load
from padfree.recipes.small import FAMILIES
from padfree.recipes.variants import conversion
from torch import Tensor, nn

import padfree
from benchmarks.images import Images, images
from benchmarks.training import BATCH, RATE, Cell, accuracy, arguments_of, fit, marks, original, run
from benchmarks.warm_start_page import page, picture

ABOUT = "warm start: batches of 64, rate 0.1, cosine, weight decay 5e-4; 20 batches to calibrate"
BATCHES, WARMUP = 20, 8
TIMM = ("test_resnet", "mobilenetv3_small_050")
# steps of fine-tuning, by epochs of 64 batches, and the highest rate: a tenth and a third of the original's
FINE_TUNING = {"1.5": (96, RATE / 10), "3": (192, RATE / 3)}


@dataclass(frozen=True)
class Set:
    """What networks are trained and tested on.

    Attributes:
        data: photos or mnist5k.
        side: pixels of an image.
        families: of networks.
        steps: batches that the original sees.
        grey: photos without colours.
        crop: pixels of a photograph that are enlarged to `side`; None: as many.
    """

    data: str
    side: int
    families: tuple[str, ...]
    steps: int = 640
    grey: bool = True
    crop: int | None = None


SETS = {
    "photos32": Set("photos", 32, tuple(FAMILIES)),
    "photos64": Set("photos", 64, tuple(FAMILIES)),
    "mnist32": Set("mnist5k", 32, tuple(FAMILIES)),
    "timm96": Set("photos", 96, TIMM, steps=320, grey=False),
    "timm224": Set("photos", 224, TIMM, steps=320, grey=False, crop=64),  # last map 7 -> 6
}


def measure(key: Cell, folder: Path) -> Cell:
    """Convert one trained network in every way and look at what came out, or fine-tune it (`epochs` over 0)."""
    begun = time.process_time()
    chosen, epochs = SETS[key["set"]], key["epochs"]
    data, recipe = images(chosen.data, chosen.side, chosen.grey, chosen.crop), network(chosen, key["family"])
    trained, curve = original(recipe, data, key["steps"], key["seed"], folder)
    torch.manual_seed(key["seed"])  # of new layers
    if epochs == "0":
        before, wider = starts(trained, recipe, data)
        found = {"before": before, "wider_side": wider, "controls": controls(trained, recipe, data), "curve": curve}
        told = " ".join(f"{name} {value:.1f}" for name, value in before.items() if value is not None)
    else:
        tuned = fine_tuned(trained, recipe, data, *FINE_TUNING[epochs], seed=1000 + key["seed"])
        found = {"tuned": tuned}
        told = " ".join(f"{name} {curve[max(curve)]:.1f}" for name, curve in tuned.items())
    return {"key": key, **found, "cpu_s": round(time.process_time() - begun, 1), "told": told}


def fine_tuned(
    trained: nn.Module, recipe: Recipe, data: Images, steps: int, rate: float, seed: int
) -> dict[str, dict[int, float]]:
    """Curves of the original, of naive conversion and of a calibrated network, trained alike."""
    settings = conversion(recipe, "padfree")
    networks = {
        "original": copy.deepcopy(trained),
        "naive": padfree.convert(trained, **{**settings, "init": "fresh"}),
        "calibrate": calibrated(
            padfree.convert(trained, **{**settings, "init": "preserve"}), calibration(data), trained
        ),
    }
    return {
        name: fit(model, data, steps, lr=rate, warmup=WARMUP, seed=seed, marks=marks(steps))
        for name, model in networks.items()
    }


def network(chosen: Set, family: str) -> Recipe:
    """The recipe of a network for a set's images."""
    changes = [f"model.input_side={chosen.side}"]
    if family in TIMM:
        changes += ["model.builder=timm", f"model.name={family}", "conversion.stem_residual=false"]
        return load("photos/resnet", changes)
    return load(f"{chosen.data}/{family}", changes)


def starts(trained: nn.Module, recipe: Recipe, data: Images) -> tuple[dict[str, float | None], int | None]:
    """Accuracies in percent without training, by how a converted network begins, and the wider side."""
    settings = conversion(recipe, "padfree")
    test, batches = data.window(data.test), calibration(data)
    made = {
        "naive": padfree.convert(trained, **{**settings, "init": "fresh"}),
        "preserve": padfree.convert(trained, **{**settings, "init": "preserve"}),
    }
    made["naive, norms measured again"] = recalibrated(made["naive"], batches)
    made["preserve, norms measured again"] = recalibrated(made["preserve"], batches)
    made["calibrate"] = calibrated(made["preserve"], batches, trained)
    found: dict[str, float | None] = {"original": accuracy(trained, test, data.test.labels)}
    found |= {name: accuracy(model, test, data.test.labels) for name, model in made.items()}
    size = padfree.compare(trained, made["preserve"], (3, data.side, data.side)).last_map_size
    wider = None if size is None or size[1] > data.side + 2 * data.margin else size[1]
    for name in ("preserve", "calibrate"):
        found[f"{name}, wider"] = None
    if wider is not None:
        more = wider - data.side
        larger = data.window(data.test, wider=more)
        found["preserve, wider"] = accuracy(made["preserve"], larger, data.test.labels)
        again = calibrated(made["preserve"], calibration(data, more), trained)
        found["calibrate, wider"] = accuracy(again, larger, data.test.labels)
    return found, wider


def calibration(data: Images, wider: int = 0) -> list[Tensor]:
    """The first training images, without labels."""
    return list(data.window(data.train, wider=wider)[: BATCHES * BATCH].split(BATCH))


def calibrated(model: nn.Module, batches: Sequence[Tensor], trained: nn.Module) -> nn.Module:
    """A calibrated copy."""
    made = copy.deepcopy(model).eval()
    padfree.calibrate(made, batches, original=trained, progress=False)
    return made


@torch.no_grad()
def recalibrated(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose norms have the plain mean of the batches' statistics, as PreciseBN takes it."""
    made = copy.deepcopy(model).eval()
    norms = [module for module in made.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        made(batch)
    for norm in norms:
        norm.momentum = 0.1
    return made.eval()


def controls(trained: nn.Module, recipe: Recipe, data: Images) -> dict[str, float]:
    """Accuracies in percent of networks that lose one thing each of what a conversion takes.

    `grid`: the original on images moved by 1 to 3 pixels down and to the right, as converted maps are sampled.
    `border`: the original whose strided convolutions read repeated borders in place of zeros.
    `positions`: the original whose strided convolutions' maps lose their last row and column.
    `stem`: the stem alone converted, with `init="preserve"`: what its activation costs.
    """
    labels, test = data.test.labels, data.window(data.test)
    moved = [accuracy(trained, data.window(data.test, step, step), labels) for step in (1, 2, 3)]
    found = {"grid": statistics.fmean(moved)}
    sites = _sites(trained, recipe)
    border = copy.deepcopy(trained)
    for path in sites:
        module = border.get_submodule(path)
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            pad = nn.ReplicationPad2d([side for side in reversed(module.padding) for _ in range(2)])
            module.padding = (0, 0)
            border.set_submodule(path, nn.Sequential(pad, module))
    found["border"] = accuracy(border, test, labels)
    positions = copy.deepcopy(trained)
    for path in sites:
        positions.get_submodule(path).register_forward_hook(lambda module, given, out: out[..., :-1, :-1])
    found["positions"] = accuracy(positions, test, labels)
    stem = padfree.convert(trained, **{**conversion(recipe, "stem-only"), "init": "preserve"})
    found["stem"] = accuracy(stem, test, labels)
    return {name: round(value, 3) for name, value in found.items()}


def _sites(trained: nn.Module, recipe: Recipe) -> list[str]:
    """Paths of the strided modules that a conversion takes the padding from, or that shrink beside them."""
    plan = padfree.plan(trained, **conversion(recipe, "downsampling-only"))
    return [match.name for match in plan.matches]


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, *TIMM], default=[*FAMILIES, *TIMM])
    parser.add_argument("--steps", type=int, help="batches of 64 that an original sees (default: its set's)")
    parser.add_argument(
        "--epochs", nargs="*", choices=FINE_TUNING, default=list(FINE_TUNING)[::-1], help="of fine-tuning"
    )
    arguments_of(parser, "warm_start")
    arguments = parser.parse_args()
    keys = [
        {
            "set": name,
            "family": family,
            "seed": seed,
            "steps": arguments.steps or SETS[name].steps,
            "epochs": epochs,
        }
        for seed in range(arguments.seeds)  # a seed of everything before the next of anything
        for epochs in ("0", *arguments.epochs)  # what is quick first
        for name in arguments.sets
        for family in SETS[name].families
        if family in arguments.families
    ]
    return run(arguments, keys, measure, ABOUT, page, picture)


if __name__ == "__main__":
    sys.exit(main())
