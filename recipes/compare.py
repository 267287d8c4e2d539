"""Train variants of a recipe from equal seeds and data order, and report what came out.

Accuracies are of the last epoch: choosing each run's best epoch by test accuracy would flatter all.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing

from .checkpoints import Progress
from .count import count
from .recipe import Recipe
from .report import plain_table, wide_console, write_json
from .train import Run, train
from .variants import variants as known_variants


@dataclass(frozen=True)
class Outcome:
    """One variant over all seeds.

    Attributes:
        variant: which network.
        params: trainable parameters.
        macs: multiply-adds of conv and linear layers for one image (fvcore).
        top1: test accuracy after the last epoch, percent, by seed.
        mean: of `top1`.
        spread: its sample standard deviation (0 with one seed).
        images_per_s: training speed, median over the epochs of all seeds.
    """

    variant: str
    params: int
    macs: int
    top1: tuple[float, ...]
    mean: float
    spread: float
    images_per_s: float


def compare_variants(
    recipe: Recipe,
    seeds: int = 3,
    variants: tuple[str, ...] = ("original", "padfree"),
    folder: Path | None = None,
    cpu: bool = False,
    quiet: bool = False,
) -> tuple[Outcome, ...]:
    """Train every variant with seeds 0 .. seeds - 1, in turns, and write comparison.json and .png.

    Runs that the folder holds whole are not trained again, and one that was stopped goes on.

    Args:
        recipe: what to train.
        seeds: how many.
        variants: which networks.
        folder: by default runs/<recipe>/compare.
        cpu: leave accelerators alone.
        quiet: no progress bars.

    Raises:
        PadfreeError: no seeds, an unknown variant, or a run fails.
    """
    from accelerate import PartialState

    if seeds < 1:
        raise PadfreeError(f"--seeds is {seeds}; give 1 or more")
    if unknown := [name for name in variants if name not in known_variants(recipe)]:
        raise PadfreeError(f"no variant {unknown[0]!r}; there are {', '.join(known_variants(recipe))}")
    if len(set(variants)) < len(variants):
        raise PadfreeError(f"--variants {','.join(variants)} names one twice")
    folder = folder or Path("runs") / recipe.name.removesuffix(".yaml").lstrip("/.") / "compare"
    runs: dict[str, list[Progress]] = {variant: [] for variant in variants}
    for seed in range(seeds):
        for variant in variants:
            place = folder / f"{variant}-seed{seed}"
            run = Run(recipe, variant, seed, place, resume=True, cpu=cpu, quiet=quiet)
            runs[variant].append(train(run))
    outcomes = tuple(_outcome(recipe, variant, runs[variant]) for variant in variants)
    if not PartialState().is_main_process:
        return outcomes
    report = {
        "recipe": recipe.name,
        "seeds": seeds,
        "epochs": recipe.training.epochs,
        "test_images": runs[variants[0]][0].epochs[-1].test_images,
        "variants": [asdict(outcome) for outcome in outcomes],
    }
    write_json(report, str(folder / "comparison.json"))
    plot(recipe, runs, folder / "comparison.png")
    show(outcomes, seeds, folder)
    return outcomes


def show(outcomes: tuple[Outcome, ...], seeds: int, folder: Path) -> None:
    """Print the outcomes as a table."""
    console = wide_console()
    sign = "+-" if console.options.ascii_only else "±"
    rows = [
        [
            outcome.variant,
            f"{outcome.mean:.2f} {sign} {outcome.spread:.2f}",
            " ".join(f"{value:.2f}" for value in outcome.top1),
            f"{outcome.images_per_s:,.0f}",
            f"{outcome.macs / 1e6:.2f}",
            f"{outcome.params:,}",
        ]
        for outcome in outcomes
    ]
    headings = ["variant", f"top-1 % ({seeds} seeds)", "by seed", "images/s", "MACs M", "params"]
    plain_table(headings, rows, console)
    page = shlex.join(["padfree-recipes", "report", str(folder), "--out", str(folder / "report.html")])
    for line in (f"{folder / 'comparison.png'}", f"a page about these runs: {page}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def plot(recipe: Recipe, runs: dict[str, list[Progress]], target: Path) -> None:
    """Draw test accuracy by epoch: a line for the mean of the seeds, a band from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for variant, seeds in runs.items():
        epochs = [item.epoch for item in seeds[0].epochs]
        by_epoch = [[run.epochs[index].test_top1 for run in seeds] for index in range(len(epochs))]
        (line,) = axes.plot(epochs, [statistics.fmean(values) for values in by_epoch], label=variant)
        low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    count_of = len(next(iter(runs.values())))
    axes.set(xlabel="epoch", ylabel="test top-1 (%)", title=f"{recipe.name}, {count_of} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(check_target(target)) as part:
        figure.savefig(part, format="png", dpi=150)


def _outcome(recipe: Recipe, variant: str, runs: list[Progress]) -> Outcome:
    top1 = tuple(run.epochs[-1].test_top1 for run in runs)
    counted = count(recipe.build(variant), recipe.model.input_side, "fvcore")
    return Outcome(
        variant=variant,
        params=counted.params,
        macs=counted.conv_linear or 0,
        top1=top1,
        mean=round(statistics.fmean(top1), 4),
        spread=round(statistics.stdev(top1), 4) if len(top1) > 1 else 0.0,
        images_per_s=round(statistics.median(item.images_per_s for run in runs for item in run.epochs), 1),
    )
