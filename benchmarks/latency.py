"""Is the padding-free network as fast as the one it replaces?

    python -m benchmarks.latency --json latency.json > latency.md
    python -m benchmarks.latency --networks ghostnet --sides 32 --runtimes eager onnxruntime
    python -m benchmarks.latency --networks timm:mobilenetv4_conv_small --sides 224 --batches 1 --runtimes eager

Every network is built as the original and as its padding-free form; in eager mode both are also run in their
deployment form (`padfree.fuse`). All of them take turns in one process, one thread. The table gives ratios, run by
run; the JSON also the milliseconds. *Floor* is the fused padding-free network whose chains return at once, over the
same fused original: what is left when padfree's operator costs nothing. A network, side or runtime that is not to be
had here is named with its reason and left out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import padfree
from benchmarks.clock import interleaved, machine, milliseconds, progress, ratio, title, write
from padfree.files.sources import Source
from padfree.layers.fused import FusedChain

PAPER = ("mobilenetv3-large", "ghostnet", "shufflenetv2-x1.0", "parc-mobilenetv2")
NETWORKS = (*PAPER, "resnet20", "efficientnet_b0", "resnet50")
SIDES = (32, 224)
BATCHES = {32: (1, 32), 224: (1, 8)}
RUNTIMES = ("eager", "eager channels_last", "compile", "onnxruntime")
Call = Callable[[], object]


class NotHere(Exception):
    """This combination cannot be measured on this machine; says why."""


def build(name: str, side: int, variant: str = "padfree") -> tuple[nn.Module, nn.Module]:
    """The original and its padding-free form, both in eval mode.

    Args:
        name: of a network of the paper, of `NETWORKS`, or library:model.
        side: pixels.
        variant: padfree, or downsampling-only, which leaves the stem as it is.

    Raises:
        NotHere: the network does not exist at that side, or needs a package that is missing.
    """
    if name in ("efficientnet_b0", "resnet50"):
        if side < 61:
            raise NotHere("its padding-free form halves six times and needs 61 pixels")
        name = f"timm:{name}"
    if ":" in name:
        try:
            original, rules = Source.from_dict(name).create().eval(), None
            if variant != "padfree":
                from padfree.recipes.variants import DOWNSAMPLING as rules
            return original, padfree.convert(original, rules=rules, input_size=(3, side, side)).eval()
        except padfree.PadfreeError as error:  # no such model, or none that such an image fits into
            raise NotHere(str(error)) from error
    recipe = {32: "cifar100-second/", 224: "vegfru-292/"}[side] + name
    if name == "resnet20":
        if side != 32:
            raise NotHere("it is a CIFAR network")
        recipe = "cifar100-first/resnet20"
    try:
        from padfree import recipes

        found = recipes.load(recipe)
        return found.build("original", seed=0).eval(), found.build(variant, seed=0).eval()
    except (ImportError, padfree.PadfreeError) as error:
        raise NotHere(f"{type(error).__name__}: {error}") from error


def runner(
    original: nn.Module, converted: nn.Module, side: int, runtime: str
) -> Callable[[torch.Tensor], dict[str, Call]]:
    """What gives, for an image batch, the variants of one network as functions to be timed."""
    models = {"original": original, "padfree": converted}
    if runtime == "compile":
        return lambda x: {name: _compiled(model, x) for name, model in models.items()}
    if runtime == "onnxruntime":
        sessions = {name: _session(model, side) for name, model in models.items()}
        return lambda x: {name: functools.partial(session, x) for name, session in sessions.items()}
    layout = torch.channels_last if runtime.endswith("channels_last") else torch.contiguous_format
    models |= {f"fused {name}": padfree.fuse(model, input_size=(3, side, side)) for name, model in models.items()}
    models["floor"] = at_once(models["fused padfree"])
    laid_out = {name: model.to(memory_format=layout) for name, model in models.items()}

    def calls(x: torch.Tensor) -> dict[str, Call]:
        image = x.contiguous(memory_format=layout)
        return {name: functools.partial(model, image) for name, model in laid_out.items()}

    return calls


def at_once(fused: nn.Module) -> nn.Module:
    """A copy whose chains compute their first output of each shape and layout, and return it ever after."""
    free = copy.deepcopy(fused)
    for module in free.modules():
        if isinstance(module, FusedChain):
            module.forward = _Remembered(module.forward)  # type: ignore[method-assign]
    return free


class _Remembered:
    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.compute = compute
        self.made: dict[tuple[object, ...], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        key = (*x.shape, *x.stride())
        if key not in self.made:
            self.made[key] = self.compute(x)
        return self.made[key]


def _compiled(model: nn.Module, x: torch.Tensor) -> Call:
    compiled = torch.compile(model, dynamic=False)
    try:
        compiled(x)
    except Exception as error:  # no compiler, or a network it cannot compile
        raise NotHere(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return lambda: compiled(x)


def _session(model: nn.Module, side: int) -> Callable[[torch.Tensor], object]:
    try:
        import onnxruntime

        from padfree.deploy.onnx import to_onnx

        with tempfile.TemporaryDirectory() as folder:
            file = to_onnx(model, Path(folder) / "model.onnx", (3, side, side), dynamic_sides=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except (ImportError, padfree.PadfreeError) as error:
        raise NotHere(str(error)) from error
    return lambda x: session.run(None, {"input": x.numpy()})


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every combination asked for."""
    rows: list[dict[str, Any]] = []
    for side in arguments.sides:
        for name in arguments.networks:
            for runtime in arguments.runtimes:
                batches = arguments.batches or BATCHES[side]
                try:
                    torch.compiler.reset()
                    calls = runner(*build(name, side), side, runtime)
                    for batch in batches:
                        rows.append(_row(name, side, batch, runtime, calls, arguments))
                        write({"machine": machine(), "rows": rows}, arguments.json)
                except NotHere as reason:
                    progress(f"{name} {side} {runtime}: left out: {reason}")
                    left_out = {"network": name, "side": side, "batch": batches[0], "runtime": runtime}
                    rows.append({**left_out, "skipped": str(reason)})
    return rows


def _row(
    name: str,
    side: int,
    batch: int,
    runtime: str,
    calls: Callable[[torch.Tensor], dict[str, Call]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(runtime.startswith("eager")), torch.no_grad():
        timings = interleaved(calls(x), arguments.rounds, arguments.seconds)
    row: dict[str, Any] = {"network": name, "side": side, "batch": batch, "runtime": runtime}
    row["ms"] = milliseconds(timings)
    row["padfree/original"] = ratio(timings, "padfree", "original")
    if "fused padfree" in timings:
        row["fused"] = ratio(timings, "fused padfree", "fused original")
        row["floor"] = ratio(timings, "floor", "fused original")
    progress(f"{name} {side} x{batch} {runtime}: {row['padfree/original']['median']:.3f}")
    return row


def means(rows: Iterable[dict[str, Any]], key: str) -> dict[tuple[str, int, int], tuple[float, int]]:
    """Geometric mean of a ratio over the paper's networks, and how many there were."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        if key in row and row["network"] in PAPER:
            groups.setdefault((row["runtime"], row["side"], row["batch"]), []).append(row[key]["median"])
    return {where: (math.exp(sum(map(math.log, g)) / len(g)), len(g)) for where, g in groups.items()}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown report."""
    lines = [f"Ratios of latency on {title(about)}; median of runs taken in turns (quartiles).", ""]
    lines += ["| network | side | batch | runtime | padfree / original | fused / fused original | floor |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['network']} | {row['side']} | {row['batch']} | {row['runtime']} "
        if "skipped" in row:
            lines.append(f"{start}| left out: {row['skipped']} | | |")
        else:
            cells = (_cell(row.get(key)) for key in ("padfree/original", "fused", "floor"))
            lines.append(f"{start}| {' | '.join(cells)} |")
    lines += ["", "Geometric means over the paper's networks:", ""]
    lines += ["| runtime | side | batch | networks | padfree / original | fused / fused original | floor |"]
    lines += ["|---|---|---|---|---|---|---|"]
    others = [means(rows, key) for key in ("fused", "floor")]
    for where, (mean, count) in means(rows, "padfree/original").items():
        figures = [f"{mean:.3f}", *(f"{other[where][0]:.3f}" if where in other else "" for other in others)]
        lines.append(f"| {' | '.join(map(str, where))} | {count} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _cell(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.3f} ({value['low']:.3f}-{value['high']:.3f})"


def network(name: str) -> str:
    """A network's name, as given on the command line.

    Raises:
        ArgumentTypeError: there is no such network.
    """
    if name in NETWORKS:
        return name
    try:
        if ":" in name:
            return str(Source.from_dict(name))
        raise padfree.PadfreeError(f"no network {name!r}; there are {', '.join(NETWORKS)}, and timm:NAME")
    except padfree.PadfreeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = f"{', '.join(NETWORKS)}; or a library's, such as timm:resnet18"
    parser.add_argument("--networks", nargs="+", type=network, metavar="NAME", default=NETWORKS, help=known)
    parser.add_argument("--sides", nargs="+", type=int, choices=SIDES, default=SIDES)
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 and 32 at 32 pixels, 1 and 8 at 224")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="about the length of one turn")
    parser.add_argument("--json", metavar="FILE", help="every figure, milliseconds included")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = measure(arguments)
    about = machine()
    write({"machine": about, "rows": rows}, arguments.json)
    print(table(rows, about))


if __name__ == "__main__":
    main()
