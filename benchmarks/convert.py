"""What the conversion itself costs: seconds a model, seconds a block, and what `import padfree` adds.

    python -m benchmarks.convert --json convert.json

`convert` is compared with building the model and tracing it whole (`timm.create_model` + `torch.fx.symbolic_trace`);
the CIFAR ResNets of the bsconv package show whether a block's share stays flat as the network grows.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import padfree
from benchmarks.clock import machine, progress, title, write

DEPTHS = (20, 56, 110, 302, 602)


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The least CPU time of a few runs."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def against_tracing(name: str, rounds: int) -> dict[str, Any]:
    """`convert` beside building and tracing the same model."""
    import timm

    model = timm.create_model(name)
    runs = {
        "convert": lambda: padfree.convert(model),
        "plan": lambda: padfree.plan(model),
        "create_and_trace": lambda: torch.fx.symbolic_trace(timm.create_model(name)),
    }
    runs["convert"]()  # caches and first imports
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):  # in turns: the machine is not equally fast all the time
        for key, run in runs.items():
            gc.collect()  # what one leaves behind is not collected in the other's time
            times[key].append(seconds(run, 1))
    turns = zip(times["convert"], times["create_and_trace"], strict=True)
    least = {f"{key}_s": round(min(found), 4) for key, found in times.items()}
    return {"model": name, **least, "ratio": round(statistics.median(ours / theirs for ours, theirs in turns), 3)}


def per_block(depth: int, rounds: int) -> dict[str, Any]:
    """`convert` on cifar_resnet of that depth."""
    import bsconv.pytorch

    model: nn.Module = bsconv.pytorch.get_model(f"cifar_resnet{depth}", num_classes=100)
    options = padfree.Options(stem_residual=True)
    convert = seconds(lambda: padfree.convert(model, options=options, input_size=(3, 32, 32)), rounds)
    blocks = (depth - 2) // 2
    return {
        "model": f"cifar_resnet{depth}",
        "blocks": blocks,
        "convert_s": round(convert, 4),
        "ms_a_block": round(1e3 * convert / blocks, 3),
    }


def import_cost(rounds: int) -> dict[str, float]:
    """Seconds of `import torch`, and of `import padfree` after it, each in fresh interpreters.

    Both from compiled bytecode, as pip installs them: the first run, which writes what is missing, does not count.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import padfree; "
    code += "c = time.perf_counter(); print(b - a, c - b)"
    runs = []
    for _ in range(1 + rounds):
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        runs.append([float(figure) for figure in output.split()])
    del runs[0]
    base, added = (statistics.median(column) for column in zip(*runs, strict=True))
    share = statistics.median(run[1] / run[0] for run in runs)
    return {"torch_s": round(base, 3), "padfree_s": round(added, 4), "share": round(share, 4)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mobilenetv3_large_100", "ghostnet_100", "resnet50"])
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="of bsconv's cifar_resnets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = machine()
    imports = import_cost(arguments.rounds)
    print(f"On {title(about)}: `import padfree` takes {imports['share']:.1%} of `import torch`.\n")
    print("| model | convert, s | create + trace, s | ratio |\n|---|---|---|---|")
    models = []
    for name in arguments.models:
        progress(name)
        models.append(row := against_tracing(name, arguments.rounds))
        print(f"| {name} | {row['convert_s']:.3f} | {row['create_and_trace_s']:.3f} | {row['ratio']:.2f} |")
    print("\n| model | blocks | convert, s | ms a block |\n|---|---|---|---|")
    depths = []
    try:
        for depth in arguments.depths:
            progress(f"cifar_resnet{depth}")
            depths.append(row := per_block(depth, max(1, arguments.rounds - depth // 150)))
            print(f"| {row['model']} | {row['blocks']} | {row['convert_s']:.3f} | {row['ms_a_block']:.2f} |")
    except ImportError as error:
        print(f"\nleft out: {error}: pip install .[bsconv]")
    write({"machine": about, "import": imports, "models": models, "depths": depths}, arguments.json)


if __name__ == "__main__":
    main()
