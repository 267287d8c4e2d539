"""What the accuracy benchmarks share: training, accuracies, cells that are kept as they are finished, and figures.

A cell is one training run with what is measured on it. Cells are functions of their keys (data set, side, family,
variant, seed), so they are computed in any order, in several processes, and never twice.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from padfree.recipes import Recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.clock import machine, progress
from benchmarks.images import Images

BATCH, RATE = 64, 0.1
Cell = dict[str, Any]


def fit(
    model: nn.Module,
    data: Images,
    steps: int,
    *,
    lr: float,
    warmup: int = 0,
    seed: int = 0,
    marks: Iterable[int] = (),
) -> dict[int, float]:
    """Train a network by SGD with Nesterov momentum 0.9 and weight decay 5e-4, on batches of 64.

    The rate rises to `lr` over `warmup` steps and falls by a cosine to 0. What is drawn depends on the seed alone.

    Returns:
        the test accuracy in percent at each of `marks` (steps).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.to(memory_format=torch.channels_last)  # a third faster on a CPU than planes one after another
    order: list[Tensor] = []
    curve: dict[int, float] = {}
    model.train()
    for step in range(steps + 1):
        if step in set(marks):
            curve[step] = accuracy(model, data.window(data.test), data.test.labels)
            model.train()
        if step == steps:
            break
        if not order:
            shuffled = torch.randperm(len(data.train.labels), generator=generator)
            order = [part for part in shuffled.split(BATCH) if len(part) == BATCH]
        optimizer.param_groups[0]["lr"] = rate(step, steps, lr, warmup)
        images, labels = data.batch(order.pop(), generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(_laid_out(images)), labels).backward()
        optimizer.step()
    model.eval()
    return curve


def original(recipe: Recipe, data: Images, steps: int, seed: int, folder: Path) -> tuple[nn.Module, dict[int, float]]:
    """A recipe's original network, trained from scratch, and its curve; kept in `folder` for whichever benchmark asks.

    Args:
        recipe: of the network.
        data: what it is trained on.
        steps: batches.
        seed: of initial values and batches.
        folder: of the weights, made where it is not there.
    """
    model = recipe.build("original", seed=seed)
    name = recipe.model.name or recipe.model.builder
    path = folder / f"{data.name}-{data.side}-{name}-{steps}-seed{seed}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            curve = json.loads(file.metadata()["curve"])
        return model.to(memory_format=torch.channels_last).eval(), {int(step): value for step, value in curve.items()}
    curve = fit(model, data, steps, lr=RATE, seed=seed, marks=marks(steps))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(weights, part, {"curve": json.dumps(curve)})
    part.replace(path)
    return model, curve


def marks(steps: int) -> list[int]:
    """Where the curve of a training run is looked at."""
    return sorted({0, steps // 8, steps // 4, steps // 2, 3 * steps // 4, steps})


def rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """The learning rate of a step: linear up, then half a cosine down."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, classes) of a network in eval mode."""
    model.eval()
    return torch.cat([model(_laid_out(part)) for part in images.split(200)])


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose largest logit is their class."""
    right = predictions(model, images).argmax(1) == labels
    return round(100 * float(right.float().mean()), 3)


def cells(
    wanted: Sequence[Cell], measure: Callable[[Cell], Cell], path: Path, about: str, jobs: int, restart: bool = False
) -> list[Cell]:
    """Measure every cell that `path` does not hold yet, and write each to it when it is done.

    Args:
        wanted: keys of the cells.
        measure: the figures of a cell; of module level, since processes call it.
        path: JSON of the cells.
        about: what was asked for, so that cells of other settings are not mixed in.
        jobs: processes.
        restart: measure all of them again.
    """
    found: list[Cell] = []
    if path.exists() and not restart:
        known = json.loads(path.read_text())
        if known["about"] != about:
            raise SystemExit(
                f"{path} holds cells of other settings ({known['about']}); give another --json or --restart"
            )
        found = known["cells"]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [cell["key"] for cell in found]
    left = [key for key in wanted if key not in done]
    begun = time.perf_counter()
    for number, cell in enumerate(_measured(left, measure, jobs), 1):
        found.append(cell)
        # written under another name first, so that a stop never leaves half a file
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"about": about, "machine": machine(), "cells": found}, indent=1) + "\n")
        part.replace(path)
        minutes = (time.perf_counter() - begun) / 60
        rest = minutes / number * (len(left) - number)
        told = " ".join(str(value) for value in cell["key"].values())
        progress(f"{number}/{len(left)} {told}: {cell['told']} ({minutes:.1f} min, about {rest:.0f} to go)")
    return [cell for cell in found if cell["key"] in wanted]


def _measured(left: Sequence[Cell], measure: Callable[[Cell], Cell], jobs: int) -> Iterable[Cell]:
    if jobs == 1:
        torch.set_num_threads(1)
        yield from map(measure, left)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for done in concurrent.futures.as_completed([pool.submit(measure, key) for key in left]):
            yield done.result()


def draw(panels: dict[str, dict[str, list[dict[Any, float]]]], target: Path, steps: str) -> None:
    """Draw curves: a panel each, a line for the mean of the seeds, a band from the lowest to the highest.

    Args:
        panels: by title: curves by label, a mapping from step to accuracy for each seed.
        target: PNG file.
        steps: what the steps are.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for label, seeds in curves.items():
            marks = sorted({int(step) for curve in seeds for step in curve})
            values = [[curve.get(step, curve.get(str(step))) for curve in seeds] for step in marks]
            (line,) = axis.plot(marks, [statistics.fmean(at) for at in values], label=label, marker=".")
            axis.fill_between(marks, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel=steps, ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def run(
    arguments: argparse.Namespace,
    keys: Sequence[Cell],
    measure: Callable[..., Cell],
    about: str,
    page: Callable[[list[Cell], dict[str, Any], str | None], str],
    picture: Callable[[list[Cell], Path], None],
) -> int:
    """Measure what is missing, print and write; cells of other keys stay in the file and out of the page."""
    if not arguments.report:
        looked_at = functools.partial(measure, folder=arguments.json.parent / "originals")
        cells(keys, looked_at, arguments.json, about, arguments.jobs, arguments.restart)
    if not arguments.json.is_file():
        raise SystemExit(f"{arguments.json}: nothing was measured yet; leave --report out")
    known = json.loads(arguments.json.read_text())
    found = sorted((cell for cell in known["cells"] if cell["key"] in keys), key=lambda cell: cell["key"]["seed"])
    if not found:
        raise SystemExit(f"{arguments.json} has no cell of what was asked for")
    if arguments.picture:
        picture(found, arguments.picture)
    text = page(found, known["machine"], arguments.picture.name if arguments.picture else None)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text, encoding="utf-8")
    print(text)
    return 0


def asked(found: Sequence[Cell], flag: str) -> str:
    """The flags that a page of these cells was made with."""
    sets = list(dict.fromkeys(cell["key"][flag] for cell in found))
    seeds = len({cell["key"]["seed"] for cell in found})
    return f"--{flag if flag == 'data' else 'sets'} {' '.join(sets)} --seeds {seeds}"


def arguments_of(parser: argparse.ArgumentParser, name: str) -> None:
    """What both benchmarks take."""
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="measure again what --json holds")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what --json holds")
    parser.add_argument("--json", metavar="FILE", type=Path, default=Path(f"runs/{name}.json"), help="every figure")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="the page, beside printing it")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="curves, as PNG")


def spread(values: Sequence[float], digits: int = 1, sign: bool = False) -> str:
    """Mean and sample standard deviation as text; with one value the value alone."""
    plus = "+" if sign else ""
    text = f"{statistics.fmean(values):{plus}.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text
