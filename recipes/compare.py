"""Train variants of a recipe from equal seeds and data order, and report what came out.

Accuracies are of the last epoch: choosing each run's best epoch by test accuracy would flatter all.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from padfree.cli.status import Status
from padfree.columns import plural, table
from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing

from .checkpoints import Progress
from .console import Console, note
from .count import count
from .recipe import Recipe
from .report import write_json
from .train import Run, train
from .variants import variants as known_variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    order = [(seed, variant) for seed in range(seeds) for variant in variants]
    for number, (seed, variant) in enumerate(order, 1):
        if not quiet and PartialState(cpu=cpu).is_main_process:
            note(f"run {number} of {len(order)}: {variant}, seed {seed}")
        place = folder / f"{variant}-seed{seed}"
        run = Run(recipe, variant, seed, place, resume=True, cpu=cpu, quiet=quiet)
        runs[variant].append(train(run))
    main = PartialState().is_main_process
    with Status(shown=main and not quiet) as tell:
        tell("counting and drawing")
        outcomes = tuple(_outcome(recipe, variant, runs[variant]) for variant in variants)
        if main:
            _write(recipe, runs, outcomes, folder)
    if main:
        show(outcomes, seeds, folder)
    return outcomes


def _write(recipe: Recipe, runs: dict[str, list[Progress]], outcomes: tuple[Outcome, ...], folder: Path) -> None:
    """comparison.json and comparison.png."""
    report = {
        "recipe": recipe.name,
        "seeds": len(outcomes[0].top1),
        "epochs": recipe.training.epochs,
        "test_images": runs[outcomes[0].variant][0].epochs[-1].test_images,
        "variants": [asdict(outcome) for outcome in outcomes],
    }
    write_json(report, str(folder / "comparison.json"))
    plot(recipe, runs, folder / "comparison.png")


def show(outcomes: tuple[Outcome, ...], seeds: int, folder: Path) -> None:
    """Print the outcomes as a table."""
    console = Console()
    sign = "+-" if console.options.ascii_only else "±"
    rows = [("variant", f"top-1 % ({plural(seeds, 'seed')})", "images/s", "MACs M", "params", "by seed")]
    for outcome in outcomes:
        spread = f" {sign} {outcome.spread:.2f}" if len(outcome.top1) > 1 else ""
        figures = (f"{outcome.mean:.2f}{spread}", f"{outcome.images_per_s:,.0f}", f"{outcome.macs / 1e6:.2f}")
        by_seed = " ".join(f"{value:.2f}" for value in outcome.top1) if spread else ""
        rows.append((outcome.variant, *figures, f"{outcome.params:,}", by_seed))
    if seeds == 1:
        rows = [row[:-1] for row in rows]  # type: ignore[misc]
    lines = table(rows, right=range(1, 5), fold=len(rows[0]) - 1)
    page = shlex.join(["padfree-recipes", "report", str(folder), "--out", str(folder / "report.html")])
    for line in (*lines, f"{folder / 'comparison.png'}", f"a page about these runs: {page}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def plot(recipe: Recipe, runs: dict[str, list[Progress]], target: Path) -> None:
    """Draw test accuracy by epoch into a PNG file."""
    with replacing(check_target(target)) as part:
        drawn(recipe.name, runs).savefig(part, format="png", dpi=150)


def drawn(name: str, runs: dict[str, list[Progress]]) -> Figure:
    """Test accuracy by epoch: a line for the mean of the seeds, a band from lowest to highest.

    Args:
        name: of the recipe.
        runs: of each variant, by seed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for variant, seeds in runs.items():
        epochs = [item.epoch for item in seeds[0].epochs]
        by_epoch = [[run.epochs[index].test_top1 for run in seeds] for index in range(len(epochs))]
        mean = [statistics.fmean(values) for values in by_epoch]
        (line,) = axes.plot(epochs, mean, label=variant, marker="o" if len(epochs) == 1 else "")
        low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    seeds_shown = plural(len(next(iter(runs.values()))), "seed")
    axes.set(xlabel="epoch", ylabel="test top-1 (%)", title=f"{name}, {seeds_shown}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


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
