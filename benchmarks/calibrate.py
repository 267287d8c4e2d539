"""What `padfree.calibrate` costs, in passes over its images.

    python -m benchmarks.calibrate                                # MobileNetV3-large at 224 pixels, 4 batches of 32
    python -m benchmarks.calibrate --network timm:resnet18 --batches 20 --images 64

Processor time of one thread, so that other programs count little. The closed forms look at what each place's 1x1 reads
with and without the pool, which are two passes a place where each begins at the image: the ratio to those is shown.
Weights are random and images noise, which cost what others do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import padfree
from benchmarks.clock import machine, title, write
from benchmarks.latency import build, network
from padfree.layers.preserve import running_norm


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def as_if_trained(model: nn.Module) -> nn.Module:
    """Statistics that norms of a trained network could have."""
    for module in model.modules():
        if running_norm(module) is module:
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
    return model.eval()


def measure(name: str, side: int, batches: int, images: int) -> dict[str, Any]:
    """Processor seconds of a pass over the images and of calibration."""
    torch.manual_seed(0)
    original = as_if_trained(build(name, side)[0])
    converted = padfree.convert(original, input_size=(3, side, side), init="preserve").eval()
    given = [torch.randn(images, 3, side, side) for _ in range(batches)]
    found: dict[str, Any] = {"network": name, "side": side, "images": batches * images}
    with torch.no_grad():
        for what, model in (("original", original), ("converted", converted)):
            model(given[0])
            found[what] = seconds(lambda model=model: [model(each) for each in given])  # type: ignore[misc]
    found["calibrate"] = seconds(
        lambda: found.update(report=padfree.calibrate(converted, given, original=original, progress=False))
    )
    report = found.pop("report")
    found["places"] = next(step.places for step in report.steps if step.name == "absorb")
    found["passes"] = found["calibrate"] / found["converted"]
    found["ratio"] = found["passes"] / max(1, 2 * found["places"])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", type=network, default="timm:mobilenetv3_large_100", metavar="NAME")
    parser.add_argument("--side", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--images", type=int, default=32, help="of a batch (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.network, arguments.side, arguments.batches, arguments.images)
    about = machine()
    write({"machine": about, **found}, arguments.json)
    print(f"Processor seconds on {title(about)}.")
    print(f"{found['network']} at {found['side']} pixels, {found['images']} images")
    print(f"a pass   original {found['original']:.1f}, converted {found['converted']:.1f}")
    print(f"calibrate {found['calibrate']:.1f}: {found['passes']:.1f} passes of the converted network,")
    print(f"          {found['ratio']:.2f} times two a place ({found['places']} places)")


if __name__ == "__main__":
    main()
