"""Seconds of a forward pass, in the form of MobileNet_123's table, with the padding-free form beside it.

Unlike the document's script it waits for the device (that one timed a GPU's launch), runs networks in eval mode without
gradients, and takes the median of several passes after a first one, which is not counted. Both forms take turns.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import padfree
from padfree.columns import WIDTH, broken, plural
from padfree.errors import PadfreeError
from padfree.files.sources import Source

from .files import RecipeError, load
from .variants import conversion

DOCUMENT = {  # the networks of the document's table, by the names that it prints
    "resnet18": "torchvision:resnet18",
    "alexnet": "torchvision:alexnet",
    "vgg16": "torchvision:vgg16",
    "squeezenet": "torchvision:squeezenet1_0",
    "mobilenet": "mobilenet123/mobilenetv1-net",
}
BATCHES = (16, 1)
SIDE = 224  # pixels, where a network says nothing of its own
LIBRARIES = ("timm", "torchvision", "bsconv")
NAME_WIDTH = 10
FIGURES = 30  # columns for two of them, and what is between


@dataclass(frozen=True)
class Timing:
    """One network at one batch size.

    Attributes:
        network: as it was named.
        batch: images of a pass.
        side: their pixels.
        device: what it ran on.
        threads: of torch, which matter on a CPU.
        original: seconds of a forward pass.
        padfree: the same of the padding-free form; None where `skipped` says why.
        skipped: why there is none.
    """

    network: str
    batch: int
    side: int
    device: str
    threads: int
    original: float
    padfree: float | None
    skipped: str | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def timings(
    names: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    *,
    side: int | None = None,
    repeats: int = 5,
    cpu: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Timing]:
    """Time networks, batch size by batch size.

    Args:
        names: recipes (name or file), or a library's networks such as `timm:resnet50`; by default the document's.
        batches: images of a pass.
        side: pixels of the images; by default the network's own, and 224 where it says nothing.
        repeats: passes that are timed, of which the median is taken.
        cpu: leave accelerators alone.
        progress: called with what is being timed.

    Raises:
        PadfreeError: there is no such network, or it does not take the images.
    """
    for what, number in (("--repeats", repeats), ("--side", side), *(("--batches", batch) for batch in batches)):
        if number is not None and number < 1:
            raise PadfreeError(f"{what} is {number}; give 1 or more")
    accelerator = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    built = {}
    for name in names or DOCUMENT:
        progress(f"building and converting {name}")
        built[name] = _forms(name, side)
    for batch in batches:
        for name, (pixels, forms, skipped) in built.items():
            progress(f"timing {name}, batch {batch}")
            images = torch.rand(batch, 3, pixels, pixels, device=device)
            seconds = _seconds(name, [form.to(device) for form in forms], images, repeats)
            yield Timing(
                name,
                batch,
                pixels,
                describe(device),
                torch.get_num_threads(),
                seconds[0],
                seconds[1] if len(forms) > 1 else None,
                skipped,
            )
            for form in forms:  # networks that wait for their turn take no memory of the device
                form.cpu()


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type if device.type != "cpu" else f"CPU {platform.machine()}"


def lines(found: Sequence[Timing]) -> Iterator[str]:
    """The document's blocks of lines `name : seconds`, with a second column, and why that is empty at places."""
    width = min(max([NAME_WIDTH, *(len(timing.network) for timing in found)]), WIDTH - FIGURES)
    before = None
    for timing in found:
        if timing.batch != before:
            if before is not None:
                yield ""
            threads = f", {plural(timing.threads, 'thread')}" if timing.device.startswith("CPU") else ""
            yield from broken(f"{timing.device}{threads}, batchsize = {timing.batch}", WIDTH)
            yield f"{'':>{width}}   original  padding-free"
            before = timing.batch
        other = "-" if timing.padfree is None else f"{timing.padfree:f}"
        *above, name = broken(timing.network, width)
        yield from above
        yield f"{name:>{width}} : {timing.original:f}  {other}"
    reasons = {timing.network: timing.skipped for timing in found if timing.skipped}
    yield ""
    about = "Seconds of a forward pass in eval mode, the device waited for; the median of passes after a first one."
    yield from broken(about, WIDTH)
    for name, reason in reasons.items():
        yield from broken(f"- {name}: {reason}", WIDTH)


def _forms(name: str, side: int | None) -> tuple[int, list[nn.Module], str | None]:
    """The side of its images, a network and its padding-free form, and why that is missing."""
    own, model, settings = _original(DOCUMENT.get(name, name))
    pixels = side or own
    try:
        converted = padfree.convert(model, **{**settings, "input_size": (3, pixels, pixels)})
    except PadfreeError as error:
        return pixels, [model.eval()], str(error)
    return pixels, [model.eval(), converted.eval()], None


def _original(name: str) -> tuple[int, nn.Module, dict[str, Any]]:
    """The side of its images, the network, and how it is converted: for a recipe, as that says."""
    if name.partition(":")[0] in LIBRARIES:
        source = Source.from_dict(name)
        return (source.input_size or (SIDE,))[-1], source.create(), {}
    try:
        recipe = load(name)
    except RecipeError as error:
        raise RecipeError(f"{error}; networks of libraries are named such as torchvision:resnet18") from error
    return recipe.model.input_side, recipe.build("original"), conversion(recipe, "padfree")


@torch.no_grad()
def _seconds(name: str, forms: Sequence[nn.Module], images: Tensor, repeats: int) -> list[float]:
    """The median pass of each form."""
    found: list[list[float]] = [[] for _ in forms]
    try:
        for form in forms:
            form(images)
        for _ in range(repeats):
            for times, form in zip(found, forms, strict=True):
                times.append(_pass(form, images))
    except RuntimeError as error:  # what a network raises that does not take such images, or a full device
        shown = " ".join(str(error).split())
        raise PadfreeError(f"{name} does not run on images {tuple(images.shape)}: {shown}") from error
    return [statistics.median(times) for times in found]


def _pass(form: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    form(images)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
