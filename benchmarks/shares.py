"""Where the time of a network goes, kind of operation by kind of operation, original beside padding-free form.

    python -m benchmarks.shares
    python -m benchmarks.shares --networks ghostnet --sides 224 --runtimes onnxruntime

Every figure is a share of the original's whole time, so a column of the original adds up to 100 and one of the
padding-free form to its ratio. Eager mode is seen by torch's profiler (whose own cost weighs on small operations),
ONNX Runtime by its own. Each operation counts with the lower quartile of its runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.clock import machine, progress, title
from benchmarks.latency import PAPER, SIDES, build

RUNTIMES = ("eager", "eager channels_last", "onnxruntime")
_KINDS = {  # what an operator's name begins with, by kind; the first that fits counts
    "convolution": ("conv", "_conv", "mkldnn_conv", "_slow_conv", "thnn_conv", "fusedconv"),
    "matrix product": ("mm", "addmm", "bmm", "gemm", "matmul", "linear"),
    "norm": ("native_batch_norm", "batchnorm"),
    "max-pool": ("max_pool", "maxpool", "maximum"),
    "chain": ("chain",),  # a whole strided chain by one operator, in fused networks
    "concatenation": ("cat", "concat"),
    "sum": ("add",),
    "layout": ("copy", "clone", "reorder", "transpose"),
    "activation": ("relu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "clamp", "silu", "clip", "quickgelu"),
    "mean": ("mean", "sum", "adaptive_avg", "reducemean", "globalaveragepool", "averagepool", "avg_pool"),
}


def kind_of(operator: str) -> str:
    """The kind that an ATen or ONNX operator belongs to; "other" where none fits."""
    name = operator.lower().removeprefix("aten::").removeprefix("padfree::")
    for kind, beginnings in _KINDS.items():
        if name.startswith(beginnings):
            return kind
    return "other"


def eager(model: nn.Module, x: torch.Tensor, runs: int) -> Counter[str]:
    """Microseconds by kind; each operator's own time, without those it calls."""
    from torch.profiler import ProfilerActivity, profile

    totals: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for _ in range(3):
            model(x)
        for _ in range(runs):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                model(x)
            once: Counter[str] = Counter()
            for event in profiler.key_averages():
                once[kind_of(event.key)] += event.self_cpu_time_total
            for kind, microseconds in once.items():
                totals[kind].append(microseconds)
    return Counter({kind: _lower(times) for kind, times in totals.items()})


def onnx(model: nn.Module, x: torch.Tensor, runs: int) -> Counter[str]:
    """Microseconds by kind, one thread."""
    import onnxruntime

    from padfree.deploy.onnx import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(model, Path(folder) / "model.onnx", tuple(x.shape[1:]), dynamic_sides=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {"input": x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"])
    found: Counter[str] = Counter()
    for (operator, _), times in nodes.items():
        found[kind_of(operator)] += _lower(times)
    return found


def _lower(times: list[float]) -> float:
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]


def shares(name: str, side: int, batch: int, runtime: str, runs: int) -> dict[str, tuple[float, float]]:
    """(original, padding-free) by kind, in per cent of the original's whole time."""
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    pair = build(name, side)
    if runtime == "onnxruntime":
        before, after = (onnx(model, x, runs) for model in pair)
    else:
        layout = torch.channels_last if runtime.endswith("channels_last") else torch.contiguous_format
        image = x.contiguous(memory_format=layout)
        before, after = (eager(model.to(memory_format=layout), image, runs) for model in pair)
    whole = sum(before.values())
    kinds = [*_KINDS, "other"]
    return {kind: (100 * before[kind] / whole, 100 * after[kind] / whole) for kind in kinds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=PAPER, default=PAPER)
    parser.add_argument("--sides", nargs="+", type=int, choices=SIDES, default=SIDES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--runs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = [*_KINDS, "other"]
    print(f"Shares in per cent of the original's time, original > padding-free, on {title(machine())}.\n")
    print("| runtime | side | network | " + " | ".join(kinds) + " | all |")
    print("|---" * (len(kinds) + 4) + "|")
    for runtime in arguments.runtimes:
        for side in arguments.sides:
            for name in arguments.networks:
                progress(f"{runtime} {side} {name}")
                found = shares(name, side, arguments.batch, runtime, arguments.runs)
                cells = [f"{a:.1f} > {b:.1f}" if max(a, b) >= 0.05 else "" for a, b in found.values()]
                cells.append(f"100 > {sum(b for _, b in found.values()):.1f}")
                print(f"| {runtime} | {side} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
