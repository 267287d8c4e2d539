"""What replacing the convolutions of a trained network keeps: fresh values, the weight's SVD, the fit to outputs.

    python -m benchmarks.replace --json replace.json

A ResNet-20 is trained on scikit-learn's digits (nothing is downloaded); all its 3x3 convolutions are replaced, by each
kind and way; then batch norms are re-estimated, and the network is trained on for an epoch. Every row is written as
soon as it is there, and a second call goes on from what the file has: the trained weights lie beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree
from benchmarks.clock import machine, progress, title, write
from padfree.replacing.norms import reestimate_norms

SIDE = 32  # pixels; the digits have 8
BATCH = 64
FITTED_ON = 256  # training images, without their labels
NORM_BATCHES = 8
RATE, TUNING_RATE = 0.05, 0.01
Data = tuple[Tensor, Tensor]


def digits(train: bool) -> Data:
    """Images (N, 3, SIDE, SIDE), normalised, and classes: the training or the test part."""
    from padfree.recipes import bundled
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    data = bundled.digits(train, Compose([Resize((SIDE, SIDE)), ToTensor(), Normalize((0.3,) * 3, (0.35,) * 3)]))
    return torch.stack([image for image, _ in data]), torch.tensor(data.targets)  # type: ignore[misc]


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """SGD with momentum, the rate falling to zero along a cosine."""
    images, classes = data
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps, generator = len(images) // BATCH, torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for epoch in range(epochs):
        for part in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), classes[part]).backward()
            optimizer.step()
            schedule.step()
        progress(f"  epoch {epoch + 1}/{epochs}")
    model.eval()


@torch.no_grad()
def logits(model: nn.Module, data: Data) -> Tensor:
    """Of the test images, in eval mode."""
    return torch.cat([model.eval()(part) for part in data[0].split(60)])


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the test images."""
    return round(100 * float((logits(model, data).argmax(1) == data[1]).float().mean()), 1)


def trained(path: Path | None, data: Data, epochs: int, seed: int) -> nn.Module:
    """The network, read from a file if it is there."""
    from bsconv.pytorch import get_model

    torch.manual_seed(seed)
    model: nn.Module = get_model("cifar_resnet20", num_classes=10)
    if path is not None and path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    progress(f"training ResNet-20 for {epochs} epochs")
    train(model, data, epochs, RATE)
    if path is not None:
        torch.save(model.state_dict(), path)
    return model


def package(kind: str) -> Callable[[nn.Module, list[Tensor]], nn.Module]:
    """The replacer of the bsconv package, on a copy."""

    def apply(model: nn.Module, batches: list[Tensor]) -> nn.Module:
        import copy

        from bsconv.pytorch import BSConvS_Replacer, BSConvU_Replacer

        replacer = BSConvU_Replacer() if kind == "bsconv-u" else BSConvS_Replacer()
        replaced: nn.Module = replacer.apply(copy.deepcopy(model)).eval()
        return replaced

    return apply


def svd(kind: str) -> Callable[[nn.Module, list[Tensor]], nn.Module]:
    """The pairs nearest to the weights."""
    return lambda model, batches: padfree.replace(model, kind, init="svd", input_size=(3, SIDE, SIDE))


def outputs(kind: str) -> Callable[[nn.Module, list[Tensor]], nn.Module]:
    """The fit to outputs, layer by layer."""
    return lambda model, batches: padfree.replace(
        model, kind, batches=batches, input_size=(3, SIDE, SIDE), progress=lambda one: progress(f"  {one}")
    )


WAYS = {"package": package, "svd": svd, "output fit": outputs}
KINDS = ("bsconv-u", "bsconv-s")


def measured(
    model: nn.Module, make: Callable[[nn.Module, list[Tensor]], nn.Module], data: tuple[Data, Data], epochs: int
) -> dict[str, Any]:
    """One row: what is kept at once, with norms re-estimated, and after training on."""
    train_data, test = data
    torch.manual_seed(0)
    start = time.process_time()
    small = make(model, list(train_data[0][:FITTED_ON].split(BATCH)))
    seconds = time.process_time() - start
    before, after = logits(model, test), logits(small, test)
    row: dict[str, Any] = {
        "params": sum(p.numel() for p in small.parameters()),
        "cpu_seconds": round(seconds, 1),
        "error_of_logits": round(float((after - before).norm() / before.norm()), 3),
        "accuracy": accuracy(small, test),
    }
    reestimate_norms(small, train_data[0][: NORM_BATCHES * BATCH].split(BATCH))
    row["norms"] = accuracy(small, test)
    train(small, train_data, epochs, TUNING_RATE)
    row["trained_on"] = accuracy(small, test)
    return row


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    epochs = result["settings"]["tuning"]
    after = f"after {epochs} epoch{'s' * (epochs > 1)}"
    heads = ["replacement", "parameters", "error of logits", "accuracy", "norms re-estimated", after, "CPU seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, row in result["rows"].items():
        figures = [f"{row['params']:,}", row["error_of_logits"], row["accuracy"], row["norms"], row["trained_on"]]
        lines.append(f"| {' | '.join(map(str, [name, *figures, row['cpu_seconds']]))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="where figures are kept, and gone on from")
    parser.add_argument("--epochs", type=int, default=8, help="of training the network")
    parser.add_argument("--tuning", type=int, default=1, help="epochs of training on after a replacement")
    parser.add_argument("--seed", type=int, default=0, help="of the network's first values")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(arguments.json) if arguments.json else None
    settings = {"side": SIDE, "epochs": arguments.epochs, "tuning": arguments.tuning, "seed": arguments.seed}
    result: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": {}}
    if path is not None and path.is_file():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            result = found
    data = digits(True), digits(False)
    weights = None if path is None else path.with_suffix(f".{arguments.epochs}.{arguments.seed}.pt")
    model = trained(weights, data[0], arguments.epochs, arguments.seed)
    result["original"] = {"params": sum(p.numel() for p in model.parameters()), "accuracy": accuracy(model, data[1])}
    progress(f"original: {result['original']}")
    for kind in KINDS:
        for way, make in WAYS.items():
            name = f"{kind}, {way}"
            if name in result["rows"]:
                continue
            progress(name)
            result["rows"][name] = measured(model, make(kind), data, arguments.tuning)
            progress(f"  {result['rows'][name]}")
            write(result, arguments.json)
    print(title(result["machine"]))
    print(f"ResNet-20 on digits at {SIDE} pixels: {result['original']}\n\n{table(result)}")


if __name__ == "__main__":
    main()
